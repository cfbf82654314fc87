// act(gate) * up, row by row, which silu_and_mul and gelu_and_mul share.
#pragma once

#include "core/op.h"
#include "ops/indices.h"
#include "ops/quantize.h"

namespace epmoe::gated_activation {

enum Function { kSilu, kGelu };
enum Numerics { kFp32, kTriton };

// gelu's 2 * sqrt(2 / pi) as a float, and what the float lacks.
constexpr float kTwoAlpha = 1.5957691f;
constexpr float kTwoAlphaRest = static_cast<float>(1.5957691216057308 - static_cast<double>(kTwoAlpha));

// The order of parameters of either op.
enum Param {
  kGateupOutput,
  kDownInput,
  kReorderTopkIds,
  kScales,
  kMaskedM,
  kOutputScales,
  kStartExpertId,
  kEndExpertId,
  kQuantization,
  kScaleFormat,
  kNumerics,
};

struct Problem {
  const Call *call = nullptr;
  const void *input = nullptr;  // [rows, 2 * width]
  int32_t input_dtype = EPMOE_FLOAT32;
  void *output = nullptr;  // [rows, width]
  int32_t output_dtype = EPMOE_FLOAT32;
  Indices reorder_topk_ids;
  const float *scales = nullptr;  // divisors by local expert
  int64_t scale_count = 0;
  const int32_t *masked_m = nullptr;  // [experts]; each expert has rows / experts rows, of which the first few count
  int64_t experts = 0;
  float *output_scales = nullptr;  // [rows, groups]
  int64_t groups = 0;
  bool quantises = false;
  bool power_of_two = false;
  Numerics numerics = kFp32;
  Function function = kSilu;
  int64_t rows = 0, width = 0;
  int64_t start_expert_id = 0, end_expert_id = INT64_MAX;
};

// The whole descriptor of such an op, apart from its name and meaning.
Op describe(const char *name, const char *doc, void (*run_cpu)(const Call &));
Problem problem_of(const Call &call, Function function);

void run_cpu(const Problem &p);
void run_cuda(const Problem &p);

}  // namespace epmoe::gated_activation
