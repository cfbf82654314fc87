// The weighted sum of a token's rows, which post_reorder, ep_gather, moe_sum_reduce and shuffle_mul_sum share.
#pragma once

#include "core/op.h"
#include "ops/indices.h"

namespace epmoe::gather_sum {

enum Numerics { kFp32, kTriton };

// A row index that no slot has: a remote expert's slot, or one that was reported and skipped.
constexpr uint32_t kNoRow = 0xffffffffu;

// output[t] = factor * sum over local slots k of weights[t,k] * rows[src2dst[t,k] - dst_start] (+ shared + residual)
struct Problem {
  const Call *call = nullptr;
  int32_t dtype = EPMOE_FLOAT32;  // of rows, output and addends
  const void *rows = nullptr;
  void *output = nullptr;
  Indices src2dst;                // absent: slot i has row i
  Indices topk_ids;               // absent: a slot is local when src2dst is not negative
  const void *weights = nullptr;  // absent: 1
  bool weights_float32 = false;
  const void *shared_output = nullptr;
  const void *residual = nullptr;
  int64_t tokens = 0, hidden = 0, topk = 0, row_count = 0;
  int64_t start_expert_id = 0, end_expert_id = INT64_MAX, dst_start = 0;
  float factor = 1.0f;
  Numerics numerics = kFp32;
  int src2dst_param = 0;  // names the argument in reports
};

// Refuses sizes that the kernels do not count to. The parameters name the arguments in errors.
void check_sizes(const Problem &p, int rows_param, int output_param, int topk_param);

void run_cpu(const Problem &p);
void run_cuda(const Problem &p);

}  // namespace epmoe::gather_sum
