// Copies each token's row to its slots' rows, scaled or quantised on the way; pre_reorder and ep_scatter share it.
#pragma once

#include "core/op.h"
#include "ops/indices.h"
#include "ops/quantize.h"

namespace epmoe::scatter_rows {

enum Numerics { kFp32, kTriton };
enum ScaleAxis { kExpert, kToken };

struct Problem {
  const Call *call = nullptr;
  const void *input = nullptr;  // [tokens, hidden]
  int32_t input_dtype = EPMOE_FLOAT32;
  void *output = nullptr;  // [row_count, hidden]
  int32_t output_dtype = EPMOE_FLOAT32;
  Indices src2dst;
  Indices topk_ids;                  // absent: a slot is local when src2dst is not negative
  const float *a1_scales = nullptr;  // divisors, by token or by local expert
  int64_t scale_count = 0;
  ScaleAxis scale_axis = kExpert;
  const float *input_scales = nullptr;  // [tokens, groups]: copied beside the rows
  float *output_scales = nullptr;       // [row_count, groups]
  int64_t groups = 0;
  quantize::Quantization quantization = quantize::kStatic;
  bool power_of_two = false;
  Numerics numerics = kFp32;
  int64_t tokens = 0, hidden = 0, topk = 0, row_count = 0;
  int64_t start_expert_id = 0, end_expert_id = INT64_MAX, dst_start = 0;
  int src2dst_param = 0, ids_param = 0;  // name the arguments in reports

  // Whether rows are moved bit by bit.
  bool copies() const {
    return quantization == quantize::kStatic && a1_scales == nullptr && input_dtype == output_dtype;
  }
  bool scales_by_expert() const { return a1_scales != nullptr && scale_axis == kExpert; }
};

void check_sizes(const Problem &p, int input_param, int output_param);

void run_cpu(const Problem &p);
void run_cuda(const Problem &p);

}  // namespace epmoe::scatter_rows
