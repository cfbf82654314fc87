// gelu_and_mul: the experts' activation between their two matrices.
// Semantics: SGLang's gelu_and_mul_triton_kernel.
#include "ops/gated_activation.h"

namespace epmoe::gelu_and_mul {
namespace {

using gated_activation::kGelu;
using gated_activation::problem_of;

const Op kOp = gated_activation::describe(
    "gelu_and_mul",
    "Activates each row: down_input[r] = gelu(gate) * up / scale, gate and up the halves of gateup_output[r], and gelu "
    "in its tanh form. Rows that are not active stay as they are.",
    [](const Call &call) { gated_activation::run_cpu(problem_of(call, kGelu)); });
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("gelu_and_mul", [](const Call &call) { gated_activation::run_cuda(problem_of(call, kGelu)); });

}  // namespace
}  // namespace epmoe::gelu_and_mul
