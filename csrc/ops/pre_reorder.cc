// pre_reorder: copies each token's row to the segments of its local experts, scaled or quantised on the way.
// Semantics: SGLang's pre_reorder_triton_kernel, deepep_permute_triton_kernel and fill_gateup_input.
#include <string>

#include "core/error.h"
#include "ops/scatter_rows.h"

namespace epmoe::pre_reorder {
namespace {

enum Param {
  kInput,
  kGateupInput,
  kSrc2dst,
  kTopkIds,
  kA1Scales,
  kInputScales,
  kOutputScales,
  kStartExpertId,
  kEndExpertId,
  kDstStart,
  kScaleAxis,
  kQuantization,
  kScaleFormat,
  kNumerics,
};
enum Axis { kTokens, kHidden, kRows, kTopk, kScales, kGroups };

constexpr const char *kScaleAxes[] = {"expert", "token"};
constexpr const char *kQuantizations[] = {"static", "token", "group"};
constexpr const char *kNumericsChoices[] = {"fp32", "triton"};

scatter_rows::Problem problem_of(const Call &call) {
  scatter_rows::Problem p;
  p.call = &call;
  p.input = call.data<const void>(kInput);
  p.input_dtype = call.dtypes[kInput];
  p.output = call.data<void>(kGateupInput);
  p.output_dtype = call.dtypes[kGateupInput];
  p.src2dst = indices_of(call, kSrc2dst);
  p.topk_ids = indices_of(call, kTopkIds);
  p.a1_scales = call.data<const float>(kA1Scales);
  p.scale_count = call.axes[kScales];
  p.scale_axis = static_cast<scatter_rows::ScaleAxis>(call.integers[kScaleAxis]);
  p.input_scales = call.data<const float>(kInputScales);
  p.output_scales = call.data<float>(kOutputScales);
  p.groups = call.axes[kGroups];
  p.quantization = static_cast<quantize::Quantization>(call.integers[kQuantization]);
  p.power_of_two = call.integers[kScaleFormat] == 1;
  p.numerics = static_cast<scatter_rows::Numerics>(call.integers[kNumerics]);
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = call.axes[kRows];
  p.start_expert_id = call.integers[kStartExpertId];
  p.end_expert_id = call.integers[kEndExpertId];
  p.dst_start = call.integers[kDstStart];
  p.src2dst_param = kSrc2dst;
  p.ids_param = kTopkIds;
  return p;
}

void check_scales(const Call &call, const scatter_rows::Problem &p) {
  if (p.scales_by_expert() && !p.topk_ids) {
    fail(EPMOE_ERR_MISSING_ARGUMENT, "topk_ids", "the experts that a1_scales is indexed by", "nothing",
         "Pass topk_ids, or scale_axis 'token'");
  }
  const int64_t local = p.end_expert_id - p.start_expert_id + 1;
  const int64_t needed = p.scale_axis == scatter_rows::kToken ? p.tokens : call.present[kEndExpertId] ? local : 1;
  if (p.scale_count < needed) {
    fail(EPMOE_ERR_SHAPE, "a1_scales", "at least " + std::to_string(needed) + " scales", std::to_string(p.scale_count),
         p.scale_axis == scatter_rows::kToken ? "Pass one for each token" : "Pass one for each local expert");
  }
}

void check_quantisation(const scatter_rows::Problem &p) {
  const int64_t groups = p.quantization == quantize::kToken ? 1 : quantize::groups_of(p.hidden);
  quantize::check({"input", "gateup_input", "a1_scales", "'token' and 'group' find",
                   "One scale a row for 'token', one for each 128 columns for 'group'", p.output_dtype,
                   p.a1_scales != nullptr, p.output_scales, p.groups, groups});
}

void validate(const Call &call) {
  const scatter_rows::Problem p = problem_of(call);
  check_expert_range(p.start_expert_id, p.end_expert_id);
  scatter_rows::check_sizes(p, kInput, kGateupInput);
  const bool finds_scales = p.quantization != quantize::kStatic;
  if (p.input_dtype == EPMOE_FLOAT8_E4M3FN && (finds_scales || p.a1_scales != nullptr)) {
    fail(EPMOE_ERR_DTYPE, "input", "float32, float16 or bfloat16 to be scaled", "float8_e4m3fn",
         "float8 rows are copied with their input_scales");
  }
  if (finds_scales) check_quantisation(p);
  if (p.a1_scales != nullptr) check_scales(call, p);
  if (p.input_scales != nullptr && finds_scales) {
    fail(EPMOE_ERR_UNEXPECTED_ARGUMENT, "input_scales", "nothing: quantization finds the scales", "a tensor",
         "Leave one of the two out");
  }
  if (p.input_scales != nullptr && p.output_scales == nullptr) {
    fail(EPMOE_ERR_MISSING_ARGUMENT, "output_scales", "a tensor that receives input_scales' rows", "nothing",
         "Pass output_scales [R, G]");
  }
  if (p.output_scales != nullptr && p.input_scales == nullptr && !finds_scales) {
    fail(EPMOE_ERR_UNEXPECTED_ARGUMENT, "output_scales", "nothing: there are no scales to write", "a tensor",
         "Pass input_scales, or quantization 'token' or 'group'");
  }
}

void run_cpu(const Call &call) { scatter_rows::run_cpu(problem_of(call)); }

const Op kOp = {
    "pre_reorder",
    "Copies each token's row to the rows of its local slots: gateup_input[src2dst[t,k] - dst_start] = input[t], "
    "divided "
    "by a scale and converted on the way. Slots of experts outside [start_expert_id, end_expert_id] are skipped; rows "
    "of "
    "no slot stay as they are.",
    {"T", "H", "R", "K", "S", "G"},
    {
        tensor_in("input", "T,H", kActivations | kFloat8,
                  "The tokens' rows; float8 rows are copied bit by bit, with their input_scales."),
        tensor_out("gateup_input", "...R,H", kFloat8, "Receives the rows; float8 saturates at 448.", kInput),
        tensor_in("src2dst", "T*K|T,K", kIndices,
                  "Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent."),
        optional(tensor_in("topk_ids", "T,K", kIndices,
                           "Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP).")),
        optional(tensor_in("a1_scales", "S", bit(EPMOE_FLOAT32), "Divisors, indexed as scale_axis says.")),
        optional(tensor_in("input_scales", "T,G", bit(EPMOE_FLOAT32),
                           "Scale rows of an already quantised input, copied to output_scales beside the rows.")),
        optional(tensor_out("output_scales", "...R,G", bit(EPMOE_FLOAT32),
                            "Receives the scales found, G = 1 a token or one for each 128 columns, or input_scales.")),
        integer("start_expert_id", 0, -kMaxInteger, kMaxInteger, "First local expert."),
        integer("end_expert_id", 2147483647, -kMaxInteger, kMaxInteger, "Last local expert, inclusive."),
        integer("dst_start", 0, -kMaxInteger, kMaxInteger, "Subtracted from src2dst to give the row."),
        choice("scale_axis", kScaleAxes, 2, "What indexes a1_scales: expert, counted from start_expert_id, or token."),
        choice("quantization", kQuantizations, 3,
               "static: by a1_scales, if any. token, group: float8 by the largest magnitude of the row or of each 128 "
               "columns, NaN aside; 448 times the scale is that magnitude, or 1e-10 where it is smaller."),
        choice("scale_format", quantize::kScaleFormats, 2,
               "Of the scales found: float32, or power_of_two, the next one up."),
        choice("numerics", kNumericsChoices, 2,
               "fp32: one division in float32, then one rounding. triton: the original's product with an approximate "
               "reciprocal."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("pre_reorder", [](const Call &call) { scatter_rows::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::pre_reorder
