// post_reorder: gathers the rows that a token's experts produced and sums them with the router's weights.
// Semantics: SGLang's post_reorder_triton_kernel and deepep_post_reorder_triton_kernel.
#include "ops/gather_sum.h"

namespace epmoe::post_reorder {
namespace {

enum Param {
  kDownOutput,
  kOutput,
  kSrc2dst,
  kTopkIds,
  kTopkWeights,
  kSharedOutput,
  kResidual,
  kStartExpertId,
  kEndExpertId,
  kDstStart,
  kRoutedScalingFactor,
  kNumerics,
};
enum Axis { kRows, kHidden, kTokens, kTopk };

constexpr const char *kNumericsChoices[] = {"fp32", "triton"};

gather_sum::Problem problem_of(const Call &call) {
  gather_sum::Problem p;
  p.call = &call;
  p.dtype = call.dtypes[kDownOutput];
  p.rows = call.data<const void>(kDownOutput);
  p.output = call.data<void>(kOutput);
  p.src2dst = indices_of(call, kSrc2dst);
  p.topk_ids = indices_of(call, kTopkIds);
  p.weights = call.data<const void>(kTopkWeights);
  p.weights_float32 = call.has_dtype(kTopkWeights, EPMOE_FLOAT32);
  p.shared_output = call.data<const void>(kSharedOutput);
  p.residual = call.data<const void>(kResidual);
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = call.axes[kRows];
  p.start_expert_id = call.integers[kStartExpertId];
  p.end_expert_id = call.integers[kEndExpertId];
  p.dst_start = call.integers[kDstStart];
  p.factor = static_cast<float>(call.reals[kRoutedScalingFactor]);
  p.numerics = static_cast<gather_sum::Numerics>(call.integers[kNumerics]);
  p.src2dst_param = kSrc2dst;
  return p;
}

void validate(const Call &call) {
  const gather_sum::Problem p = problem_of(call);
  check_expert_range(p.start_expert_id, p.end_expert_id);
  gather_sum::check_sizes(p, kDownOutput, kOutput, kTopkWeights);
}

void run_cpu(const Call &call) { gather_sum::run_cpu(problem_of(call)); }

const Op kOp = {
    "post_reorder",
    "Sums, for every token, the rows its local experts produced, each times the router's weight: output[t] = "
    "routed_scaling_factor * sum over slots k of topk_weights[t,k] * down_output[src2dst[t,k] - dst_start] + "
    "shared_output[t] "
    "+ residual[t]. Slots of "
    "experts outside [start_expert_id, end_expert_id] are skipped, their rows never read; a token without local slots "
    "gets zeros and what is added.",
    {"R", "H", "T", "K"},
    {
        tensor_in("down_output", "...R,H", kActivations,
                  "Rows of the experts' outputs; rows of skipped slots may be uninitialised."),
        tensor_out("output", "T,H", 0, "Receives one row a token; every element is written.", kDownOutput),
        tensor_in("src2dst", "T*K|T,K", kIndices,
                  "Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent."),
        optional(tensor_in("topk_ids", "T,K", kIndices,
                           "Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP).")),
        tensor_in("topk_weights", "T,K", bit(EPMOE_FLOAT32), "Router weight of each slot.", kDownOutput),
        optional(
            tensor_in("shared_output", "T,H", 0, "Added to the sum, e.g. the shared experts' output.", kDownOutput)),
        optional(tensor_in("residual", "T,H", 0, "Added last.", kDownOutput)),
        integer("start_expert_id", 0, -kMaxInteger, kMaxInteger, "First local expert."),
        integer("end_expert_id", 2147483647, -kMaxInteger, kMaxInteger, "Last local expert, inclusive."),
        integer("dst_start", 0, -kMaxInteger, kMaxInteger, "Subtracted from src2dst to give the row."),
        real("routed_scaling_factor", 1.0, "Multiplies the sum."),
        choice("numerics", kNumericsChoices, 2,
               "fp32: float32 accumulation in slot order, one final rounding. triton: the original kernel's "
               "arithmetic, every partial sum and every weight rounded to the activation dtype."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("post_reorder", [](const Call &call) { gather_sum::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::post_reorder
