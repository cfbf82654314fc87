// preprocess: orders slots by expert, so that each expert's rows lie side by side.
// Semantics: SGLang's run_moe_ep_preproess, deepep_run_moe_deep_preprocess and moe_ep_deepgemm_preprocess.
#include <string>

#include "core/error.h"
#include "ops/expert_order.h"

namespace epmoe::preprocess {
namespace {

enum Param { kTopkIds, kSrc2dst, kSegIndptr, kReorderTopkIds, kMaskedM, kMMax, kNegatives };
enum Axis { kTokens, kTopk, kExperts };

constexpr const char *kNegativesChoices[] = {"counted", "dropped"};

expert_order::Problem problem_of(const Call &call) {
  expert_order::Problem p;
  p.call = &call;
  p.topk_ids = indices_of(call, kTopkIds);
  p.slots = call.axes[kTokens] * call.axes[kTopk];
  p.topk = call.axes[kTopk];
  p.experts = call.axes[kExperts];
  p.m_max = call.integers[kMMax];
  p.drop_negatives = call.integers[kNegatives] == 1;
  p.src2dst = call.data<void>(kSrc2dst);
  p.src2dst_int64 = call.has_dtype(kSrc2dst, EPMOE_INT64);
  p.seg_indptr = call.data<int64_t>(kSegIndptr);
  p.reorder_topk_ids = call.data<void>(kReorderTopkIds);
  p.masked_m = call.data<int32_t>(kMaskedM);
  p.ids_param = kTopkIds;
  p.limit_param = kMMax;
  return p;
}

void validate(const Call &call) {
  const expert_order::Problem p = problem_of(call);
  expert_order::check_sizes(p);
  if (!p.src2dst_int64 && p.m_max > INT32_MAX / p.experts) {
    fail(EPMOE_ERR_VALUE, "m_max", "rows that int32 counts: at most " + std::to_string(INT32_MAX / p.experts),
         std::to_string(p.m_max), "Pass src2dst as int64");
  }
}

void run_cpu(const Call &call) { expert_order::run_cpu(problem_of(call)); }

const Op kOp = {
    "preprocess",
    "Orders slots by expert, stably and without a sort: src2dst[i] is the row of slot i when rows are grouped by "
    "expert, then by slot, and seg_indptr[e] to seg_indptr[e+1] are the rows of expert e. Runs without waiting for the "
    "device.",
    {"T", "K", "E"},
    {
        tensor_in("topk_ids", "T,K", kIndices, "Expert of each slot: 0 to E-1, or -1 for none."),
        tensor_out("src2dst", "T*K|T,K", kIndices, "Receives the row of each slot."),
        tensor_out("seg_indptr", "E+1", bit(EPMOE_INT64), "Receives where each expert's rows begin, and the end."),
        optional(tensor_out("reorder_topk_ids", "T*K", 0, "Receives the expert of each row.", kTopkIds)),
        optional(tensor_out("masked_m", "E", bit(EPMOE_INT32), "Receives how many slots each expert has.")),
        integer("m_max", 0, 0, INT32_MAX,
                "0: rows are packed. Otherwise each expert has m_max rows (DeepGEMM): src2dst is expert * m_max + its "
                "place in the expert, and -1 for slots without an expert."),
        choice("negatives", kNegativesChoices, 2,
               "counted: slots of -1 come first and count as rows before expert 0's, within its segment "
               "(run_moe_ep_preproess). dropped: rows begin with expert 0; slots of -1 get negative rows, and "
               "reorder_topk_ids ends with their -1 (DeepEP)."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);
EPMOE_REGISTER_CUDA("preprocess", [](const Call &call) { expert_order::run_cuda(problem_of(call)); });

}  // namespace
}  // namespace epmoe::preprocess
