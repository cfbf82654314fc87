// ep_gather: the way back of ep_scatter, each token's rows summed with the router's weights.
// Semantics: SGLang's ep_gather.
#include "ops/gather_sum.h"

namespace epmoe::ep_gather {
namespace {

enum Param { kInputTensor, kRecvTopkIds, kRecvTopkWeight, kInputIndex, kOutputTensor };
enum Axis { kRows, kHidden, kTokens, kTopk };

gather_sum::Problem problem_of(const Call &call) {
  gather_sum::Problem p;
  p.call = &call;
  p.dtype = call.dtypes[kInputTensor];
  p.rows = call.data<const void>(kInputTensor);
  p.output = call.data<void>(kOutputTensor);
  p.src2dst = indices_of(call, kInputIndex);
  p.topk_ids = indices_of(call, kRecvTopkIds);
  p.weights = call.data<const void>(kRecvTopkWeight);
  p.weights_float32 = call.has_dtype(kRecvTopkWeight, EPMOE_FLOAT32);
  p.tokens = call.axes[kTokens];
  p.hidden = call.axes[kHidden];
  p.topk = call.axes[kTopk];
  p.row_count = call.axes[kRows];
  p.src2dst_param = kInputIndex;
  return p;
}

void validate(const Call &call) {
  gather_sum::check_sizes(problem_of(call), kInputTensor, kOutputTensor, kRecvTopkIds);
}

void run_cpu(const Call &call) { gather_sum::run_cpu(problem_of(call)); }

const Op kOp = {
    "ep_gather",
    "Sums, for every token, the rows ep_scatter placed: output_tensor[t] = sum over slots k with recv_topk_ids[t,k] >= "
    "0 of recv_topk_weight[t,k] * input_tensor[input_index[t,k]], accumulated in float32 in order and rounded once.",
    {"M", "H", "T", "K"},
    {
        tensor_in("input_tensor", "M,H", kActivations, "The experts' rows; rows of no slot may be uninitialised."),
        tensor_in("recv_topk_ids", "T,K", kIndices, "Expert of each slot, local to the rank; negative: not here."),
        tensor_in("recv_topk_weight", "T,K", bit(EPMOE_FLOAT32), "Router weight of each slot.", kInputTensor),
        tensor_in("input_index", "T,K", kIndices, "Row of each slot, as ep_scatter's output_index."),
        tensor_out("output_tensor", "T,H", 0, "Receives one row a token; every element is written.", kInputTensor),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("ep_gather", [](const Call &call) { gather_sum::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::ep_gather
