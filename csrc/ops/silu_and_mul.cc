// silu_and_mul: the experts' activation between their two matrices.
// Semantics: SGLang's silu_and_mul_triton_kernel and silu_and_mul_masked_post_quant_fwd.
#include "ops/gated_activation.h"

namespace epmoe::silu_and_mul {
namespace {

using gated_activation::kSilu;
using gated_activation::problem_of;

const Op kOp = gated_activation::describe(
    "silu_and_mul",
    "Activates each row: down_input[r] = silu(gate) * up / scale, gate and up the halves of gateup_output[r], and "
    "silu(x) = x / (1 + exp(-x)). Rows that are not active stay as they are.",
    [](const Call &call) { gated_activation::run_cpu(problem_of(call, kSilu)); });
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("silu_and_mul", [](const Call &call) { gated_activation::run_cuda(problem_of(call, kSilu)); });

}  // namespace
}  // namespace epmoe::silu_and_mul
