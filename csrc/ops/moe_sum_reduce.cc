// moe_sum_reduce: sums each token's K rows, which lie side by side.
// Semantics: sgl-kernel's moe_sum_reduce.
#include "ops/gather_sum.h"

namespace epmoe::moe_sum_reduce {
namespace {

enum Param { kInput, kOutput, kRoutedScalingFactor };
enum Axis { kTokens, kTopk, kHidden };

gather_sum::Problem problem_of(const Call &call) {
  gather_sum::Problem p;
  p.call = &call;
  p.dtype = call.dtypes[kInput];
  p.rows = call.data<const void>(kInput);
  p.output = call.data<void>(kOutput);
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = p.tokens * p.topk;
  p.factor = static_cast<float>(call.reals[kRoutedScalingFactor]);
  return p;
}

void validate(const Call &call) { gather_sum::check_sizes(problem_of(call), kInput, kOutput, kInput); }

void run_cpu(const Call &call) { gather_sum::run_cpu(problem_of(call)); }

const Op kOp = {
    "moe_sum_reduce",
    "Sums every token's rows: output[t] = routed_scaling_factor * sum over k of input[t,k], accumulated in float32 in "
    "order and rounded once.",
    {"T", "K", "H"},
    {
        tensor_in("input", "T,K,H", kActivations, "The experts' rows, already weighted."),
        tensor_out("output", "T,H", 0, "Receives one row a token.", kInput),
        real("routed_scaling_factor", 1.0, "Multiplies the sum."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("moe_sum_reduce", [](const Call &call) { gather_sum::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::moe_sum_reduce
