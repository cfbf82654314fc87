// ep_scatter: places received rows in their experts' reserved segments, in order of token and slot.
// Semantics: SGLang's ep_scatter, whose order within an expert is left to chance.
#include "core/error.h"
#include "ops/expert_order.h"
#include "ops/scatter_rows.h"

namespace epmoe::ep_scatter {
namespace {

enum Param {
  kRecvX,
  kRecvXScale,
  kRecvTopk,
  kNumRecvTokensPerExpert,
  kExpertStartLoc,
  kOutputTensor,
  kOutputTensorScale,
  kMIndices,
  kOutputIndex,
};
enum Axis { kTokens, kHidden, kGroups, kTopk, kExperts, kRows };

expert_order::Problem order_of(const Call &call) {
  expert_order::Problem p;
  p.call = &call;
  p.topk_ids = indices_of(call, kRecvTopk);
  p.slots = call.axes[kTokens] * call.axes[kTopk];
  p.topk = call.axes[kTopk];
  p.experts = call.axes[kExperts];
  p.reserved = call.data<const int32_t>(kNumRecvTokensPerExpert);
  p.row_count = call.axes[kRows];
  p.src2dst = call.data<void>(kOutputIndex);
  p.expert_start_loc = call.data<int32_t>(kExpertStartLoc);
  p.m_indices = call.data<int32_t>(kMIndices);
  p.ids_param = kRecvTopk;
  p.limit_param = kNumRecvTokensPerExpert;
  return p;
}

scatter_rows::Problem rows_of(const Call &call) {
  scatter_rows::Problem p;
  p.call = &call;
  p.input = call.data<const void>(kRecvX);
  p.input_dtype = call.dtypes[kRecvX];
  p.output = call.data<void>(kOutputTensor);
  p.output_dtype = call.dtypes[kOutputTensor];
  p.src2dst = indices_of(call, kOutputIndex);
  p.input_scales = call.data<const float>(kRecvXScale);
  p.output_scales = call.data<float>(kOutputTensorScale);
  p.groups = call.axes[kGroups];
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = call.axes[kRows];
  p.src2dst_param = kOutputIndex;
  return p;
}

void validate(const Call &call) {
  expert_order::check_sizes(order_of(call));
  scatter_rows::check_sizes(rows_of(call), kRecvX, kOutputTensor);
  if (call.axes[kRows] > INT32_MAX) {
    fail(EPMOE_ERR_SHAPE, "output_tensor", "fewer than 2^31 rows", std::to_string(call.axes[kRows]), "Split the call");
  }
  if (call.present[kRecvXScale] != call.present[kOutputTensorScale]) {
    const bool lacks_output = call.present[kRecvXScale];
    fail(EPMOE_ERR_MISSING_ARGUMENT, lacks_output ? "output_tensor_scale" : "recv_x_scale",
         lacks_output ? "a tensor that receives recv_x_scale's rows" : "the scales that output_tensor_scale receives",
         "nothing", "Pass both or neither");
  }
}

// The rows are moved whatever was wrong with single slots, which have no row then.
void run_cpu(const Call &call) {
  try {
    expert_order::run_cpu(order_of(call));
  } catch (const Failure &) {
    scatter_rows::run_cpu(rows_of(call));
    throw;
  }
  scatter_rows::run_cpu(rows_of(call));
}

const Op kOp = {
    "ep_scatter",
    "Places received rows in their experts' segments: segments are as long as num_recv_tokens_per_expert says and "
    "follow "
    "each other; within one, rows are in order of token and slot.",
    {"T", "H", "G", "K", "E", "M"},
    {
        tensor_in("recv_x", "T,H", kActivations | kFloat8, "Received rows."),
        optional(tensor_in("recv_x_scale", "T,G", bit(EPMOE_FLOAT32), "Their scales, copied beside them.")),
        tensor_in("recv_topk", "T,K", kIndices, "Expert of each slot, local to the rank; -1: not here."),
        tensor_in("num_recv_tokens_per_expert", "E", bit(EPMOE_INT32),
                  "Rows reserved for each expert, usually padded to 128."),
        tensor_out("expert_start_loc", "E", bit(EPMOE_INT32), "Receives each segment's first row."),
        tensor_out("output_tensor", "M,H", 0, "Receives the rows; rows of no slot stay as they are.", kRecvX),
        optional(tensor_out("output_tensor_scale", "M,G", bit(EPMOE_FLOAT32), "Receives the scales.")),
        tensor_out("m_indices", "M", bit(EPMOE_INT32),
                   "Receives the expert of each reserved row; rows beyond the last segment stay as they are."),
        tensor_out("output_index", "T,K", bit(EPMOE_INT32), "Receives the row of each slot, -1 where it has none."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("ep_scatter", [](const Call &call) {
  expert_order::run_cuda(order_of(call));
  if (call.axes[kTokens] > 0 && call.axes[kHidden] > 0) scatter_rows::run_cuda(rows_of(call));
});

}  // namespace
}  // namespace epmoe::ep_scatter
