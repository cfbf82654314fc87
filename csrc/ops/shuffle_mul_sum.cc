// shuffle_mul_sum: gathers each token's rows by a permutation and sums them, weighted or not.
// Semantics: sgl-kernel's apply_shuffle_mul_sum.
#include "ops/gather_sum.h"

namespace epmoe::shuffle_mul_sum {
namespace {

enum Param { kInput, kOutput, kPermutation, kFactors };
enum Axis { kRows, kHidden, kTokens, kTopk };

gather_sum::Problem problem_of(const Call &call) {
  gather_sum::Problem p;
  p.call = &call;
  p.dtype = call.dtypes[kInput];
  p.rows = call.data<const void>(kInput);
  p.output = call.data<void>(kOutput);
  p.src2dst = indices_of(call, kPermutation);
  p.weights = call.data<const void>(kFactors);
  p.weights_float32 = call.has_dtype(kFactors, EPMOE_FLOAT32);
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = call.axes[kRows];
  p.src2dst_param = kPermutation;
  return p;
}

void validate(const Call &call) {
  const gather_sum::Problem p = problem_of(call);
  if (p.tokens > 0) gather_sum::check_sizes(p, kInput, kOutput, kPermutation);  // without tokens nothing says what K is
}

void run_cpu(const Call &call) { gather_sum::run_cpu(problem_of(call)); }

const Op kOp = {
    "shuffle_mul_sum",
    "Gathers and sums: output[t] = sum over k of input[permutation[t,k]] * factors[t,k], accumulated in float32 in "
    "order and rounded once.",
    {"R", "H", "T", "K"},
    {
        tensor_in("input", "R,H", kActivations, "Rows in the experts' order."),
        tensor_out("output", "T,H", 0, "Receives one row a token; every element is written.", kInput),
        tensor_in("permutation", "T*K|T,K", kIndices, "Row of each slot; negative entries are skipped."),
        optional(tensor_in("factors", "T,K|T*K", bit(EPMOE_FLOAT32), "Weight of each slot; 1 when absent.", kInput)),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("shuffle_mul_sum", [](const Call &call) { gather_sum::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::shuffle_mul_sum
