// The order of slots by expert, which preprocess and ep_scatter share: a counting pass instead of a sort.
#pragma once

#include "core/op.h"
#include "ops/indices.h"

namespace epmoe::expert_order {

// Slots in order of expert, then of flat slot. Ids are in [-1, experts); others are reported and count as -1.
struct Problem {
  const Call *call = nullptr;
  Indices topk_ids;
  int64_t slots = 0, topk = 1, experts = 0;

  // Where rows of an expert begin: packed (preprocess), expert * m_max (DeepGEMM) or the running sum of `reserved`.
  const int32_t *reserved = nullptr;
  int64_t m_max = 0;
  int64_t row_count = INT64_MAX;  // rows there are; a slot beyond is reported
  bool drop_negatives = false;    // DeepEP: rows start at the first valid slot, and -1 slots get negative rows

  void *src2dst = nullptr;
  bool src2dst_int64 = false;
  int64_t *seg_indptr = nullptr;        // [experts + 1]
  void *reorder_topk_ids = nullptr;     // [slots], of the dtype of topk_ids
  int32_t *masked_m = nullptr;          // [experts]
  int32_t *expert_start_loc = nullptr;  // [experts]
  int32_t *m_indices = nullptr;         // [row_count]

  int ids_param = 0, limit_param = 0;  // name the arguments in reports
};

void check_sizes(const Problem &p);

void run_cpu(const Problem &p);
void run_cuda(const Problem &p);

}  // namespace epmoe::expert_order
