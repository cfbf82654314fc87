// The gated activation: its descriptor, and the CPU's half.
#include "ops/gated_activation.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "core/convert.h"
#include "core/error.h"
#include "core/exp.h"
#include "core/simd.h"
#include "core/threads.h"

namespace epmoe::gated_activation {
namespace {

enum Axis { kRows, kWidth, kScaleCount, kExperts, kGroups };

constexpr const char *kQuantizations[] = {"static", "group"};
constexpr const char *kNumericsChoices[] = {"fp32", "triton"};

// g * logistic(g), or g * logistic(2u): gelu's 1 + tanh(u) is twice that. Of the two forms of the logistic function the
// one that rounds less: for positive g what is taken away from 1, where 1 + e would drop the last bits of e.
template <Function kFunction>
EPMOE_INLINE float activate(float g) {
  constexpr float kEnd = 110.0f;  // beyond, exp is 0 anyway
  const float size = std::fabs(g) < kEnd ? std::fabs(g) : kEnd;
  float power;
  if constexpr (kFunction == kSilu) {
    power = exp_minus(size);
  } else {
    // exp magnifies the error of its argument, so 2u is kept in two parts: p, and the little that p lacks.
    const float inner = std::fma(0.044715f * size * size, size, size);
    const float p = inner * kTwoAlpha;
    const float lacking = std::fma(inner, kTwoAlphaRest, std::fma(inner, kTwoAlpha, -p));
    power = exp_minus(p < kEnd ? p : kEnd);
    power = std::fma(power, -lacking, power);
  }
  const float away = power / (1.0f + power);
  return g > 0.0f ? std::fma(-size, away, g) : g * away;
}

EPMOE_SIMD void silu(float *out, const float *gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = activate<kSilu>(gate[i]);
}
EPMOE_SIMD void gelu(float *out, const float *gate, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = activate<kGelu>(gate[i]);
}
EPMOE_SIMD void multiply(float *out, const float *by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] *= by[i];
}
EPMOE_SIMD void multiply(float *out, float by, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] *= by;
}

// The whole of it in one loop, where nothing lies between the activation and the product: the same roundings, and a
// third of the loads and stores.
template <typename Element, Function kFunction>
EPMOE_INLINE void gated(void *out, const void *gate, const void *up, int64_t n) {
  using Storage = typename Element::Storage;
  auto *__restrict to = static_cast<Storage *>(out);
  const auto *gates = static_cast<const Storage *>(gate);
  const auto *ups = static_cast<const Storage *>(up);
  for (int64_t i = 0; i < n; ++i) {
    to[i] = Element::narrow(activate<kFunction>(Element::widen(gates[i])) * Element::widen(ups[i]));
  }
}
#define EPMOE_GATED_LOOPS(Element, suffix)                                                \
  EPMOE_SIMD void silu_##suffix(void *out, const void *gate, const void *up, int64_t n) { \
    gated<Element, kSilu>(out, gate, up, n);                                              \
  }                                                                                       \
  EPMOE_SIMD void gelu_##suffix(void *out, const void *gate, const void *up, int64_t n) { \
    gated<Element, kGelu>(out, gate, up, n);                                              \
  }
EPMOE_GATED_LOOPS(Float32, float32)
EPMOE_GATED_LOOPS(BFloat16, bfloat16)

// That loop, or nullptr for a dtype that has none: float16's conversions leave it too few registers.
auto gated_loop(Function function, int32_t dtype) -> void (*)(void *, const void *, const void *, int64_t) {
  switch (dtype) {
    case EPMOE_FLOAT32:
      return function == kSilu ? silu_float32 : gelu_float32;
    case EPMOE_BFLOAT16:
      return function == kSilu ? silu_bfloat16 : gelu_bfloat16;
    default:
      return nullptr;
  }
}

constexpr int64_t kColumns = 512;      // at a time: both halves as float32 stay in the first cache
constexpr int64_t kBytesAhead = 4096;  // of the rows, hinted: two short streams are too little for the prefetcher
static_assert(kColumns % quantize::kGroupSize == 0);

class Activation {
 public:
  explicit Activation(const Problem &p) : p_(p) {
    const bool bare = p.numerics != kTriton && !p.quantises && p.input_dtype == p.output_dtype;
    loop_ = bare ? gated_loop(p.function, p.input_dtype) : nullptr;
  }

  void run() {
    const int64_t each = p_.masked_m == nullptr ? p_.rows : p_.rows / p_.experts;
    parallel_for(p_.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p_.width)),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     if (p_.masked_m != nullptr && row % each >= p_.masked_m[row / each]) continue;
                     int64_t expert = 0;
                     if (p_.reorder_topk_ids) {
                       const int64_t id = p_.reorder_topk_ids[row];
                       if (id < p_.start_expert_id || id > p_.end_expert_id) continue;
                       expert = id - p_.start_expert_id;
                       if (p_.scales != nullptr && expert >= p_.scale_count) {
                         bad_ids_.report(row);
                         continue;
                       }
                     }
                     const float *scale = p_.scales == nullptr ? nullptr : p_.scales + expert;
                     for (int64_t column = 0; column < p_.width; column += kColumns) move(row, column, scale);
                   }
                 });
    if (bad_ids_.any()) {
      bad_ids_.raise("reorder_topk_ids", p_.reorder_topk_ids[bad_ids_.first()], p_.start_expert_id,
                     p_.start_expert_id + p_.scale_count, 1,
                     "scales has no entry for this expert; the row was skipped and the rest computed");
    }
    for (int64_t e = 0; p_.masked_m != nullptr && e < p_.experts; ++e) {
      if (p_.masked_m[e] <= each && p_.masked_m[e] >= 0) continue;
      Offence offence;
      offence.report(e);
      offence.raise("masked_m", p_.masked_m[e], 0, each + 1, 1,
                    "It was taken for the nearest end; the rest is computed");
    }
  }

 private:
  // Up to kColumns columns of a row.
  void move(int64_t row, int64_t column, const float *scale) const {
    const int64_t n = std::min(kColumns, p_.width - column);
    const int64_t gate_at = row * 2 * p_.width + column, up_at = gate_at + p_.width, at = row * p_.width + column;
    char *out = static_cast<char *>(p_.output) + at * itemsize(p_.output_dtype);
    if (loop_ != nullptr && scale == nullptr)
      loop_(out, ahead(gate_at, n), ahead(up_at, n), n);
    else
      compute(out, row, column, n, scale);
  }

  // The same in steps.
  void compute(char *out, int64_t row, int64_t column, int64_t n, const float *scale) const {
    const bool rounded = p_.numerics == kTriton;
    const int64_t gate_at = row * 2 * p_.width + column, up_at = gate_at + p_.width;
    float y[kColumns], up_scratch[kColumns];
    const float *gate = input(y, gate_at, n);
    const float *up = input(up_scratch, up_at, n);
    (p_.function == kSilu ? silu : gelu)(y, gate, n);
    if (rounded) round(y, n);
    multiply(y, up, n);
    if (rounded) round(y, n);
    if (scale != nullptr && rounded) {
      float factor = 1.0f / *scale;
      round(&factor, 1);
      multiply(y, factor, n);
      round(y, n);
    } else if (scale != nullptr) {
      divide_row(y, y, *scale, n);
    }
    if (p_.quantises) {
      quantize::divide_by_scales(y, y, n, quantize::kGroupSize, p_.power_of_two, rounded,
                                 p_.output_scales + row * p_.groups + column / quantize::kGroupSize);
    }
    narrow_row(out, y, p_.output_dtype, n);
  }

  // Elements [at, at + n) of the input, with a hint of what comes behind them.
  const char *ahead(int64_t at, int64_t n) const {
    const int64_t size = itemsize(p_.input_dtype);
    const char *data = static_cast<const char *>(p_.input) + at * size;
    const int64_t left = (p_.rows * 2 * p_.width - at) * size;
    for (int64_t i = kBytesAhead; i < std::min(left, kBytesAhead + n * size); i += 64) __builtin_prefetch(data + i);
    return data;
  }

  // The same as float32.
  const float *input(float *scratch, int64_t at, int64_t n) const {
    const char *data = ahead(at, n);
    if (p_.input_dtype == EPMOE_FLOAT32) return reinterpret_cast<const float *>(data);
    widen_row(scratch, data, p_.input_dtype, n);
    return scratch;
  }

  void round(float *x, int64_t n) const {
    if (p_.input_dtype == EPMOE_FLOAT32) return;
    uint16_t rounded[kColumns];
    narrow_row(rounded, x, p_.input_dtype, n);
    widen_row(x, rounded, p_.input_dtype, n);
  }

  const Problem &p_;
  void (*loop_)(void *, const void *, const void *, int64_t);
  Offence bad_ids_;
};

void check_gates(const Call &call, const Problem &p) {
  check_expert_range(p.start_expert_id, p.end_expert_id);
  if (p.scales != nullptr && !p.reorder_topk_ids) {
    fail(EPMOE_ERR_MISSING_ARGUMENT, "reorder_topk_ids", "the experts that scales is indexed by", "nothing",
         "Pass reorder_topk_ids, or leave scales out");
  }
  const int64_t local = p.end_expert_id - p.start_expert_id + 1;
  if (p.scales != nullptr && call.present[kEndExpertId] && p.scale_count < local) {
    fail(EPMOE_ERR_SHAPE, "scales", "at least " + std::to_string(local) + " scales", std::to_string(p.scale_count),
         "Pass one for each local expert");
  }
  if (p.masked_m != nullptr && (p.experts == 0 || p.experts > 65535 || p.rows % p.experts != 0)) {
    fail(EPMOE_ERR_SHAPE, "masked_m", "1 to 65535 experts that divide the " + std::to_string(p.rows) + " rows",
         std::to_string(p.experts), "Pass gateup_output as [E, M, 2*I]");
  }
}

void validate(const Call &call) {
  const Problem p = problem_of(call, kSilu);
  check_gates(call, p);
  if (p.width > INT32_MAX / 2) {
    fail(EPMOE_ERR_SHAPE, "down_input", "a width I below 2^30", std::to_string(p.width), "Split the call");
  }
  if (!p.quantises) {
    if (p.output_scales == nullptr) return;
    fail(EPMOE_ERR_UNEXPECTED_ARGUMENT, "output_scales", "nothing: there are no scales to write", "a tensor",
         "Pass quantization 'group'");
  }
  quantize::check({"gateup_output", "down_input", "scales", "'group' finds", "One scale for each 128 columns",
                   p.output_dtype, p.scales != nullptr, p.output_scales, p.groups, quantize::groups_of(p.width)});
}

}  // namespace

Op describe(const char *name, const char *doc, void (*run_cpu)(const Call &)) {
  return {
      name,
      doc,
      {"R", "I", "S", "E", "G"},
      {
          tensor_in("gateup_output", "...R,2*I", kActivations,
                    "Rows of the first grouped GEMM: the gate's half, then the up half."),
          tensor_out("down_input", "...R,I", kFloat8, "Receives the active rows; float8 saturates at 448.",
                     kGateupOutput),
          optional(tensor_in("reorder_topk_ids", "R", kIndices,
                             "Expert of each row: active when within [start_expert_id, end_expert_id]; all are when "
                             "absent.")),
          optional(tensor_in("scales", "S", bit(EPMOE_FLOAT32), "Divisor of each local expert.")),
          optional(tensor_in("masked_m", "E", bit(EPMOE_INT32),
                             "Active rows of each expert, which has R/E of them (DeepGEMM).")),
          optional(tensor_out("output_scales", "...R,G", bit(EPMOE_FLOAT32),
                              "Receives the scales found, one for each 128 columns.")),
          integer("start_expert_id", 0, -kMaxInteger, kMaxInteger, "First local expert."),
          integer("end_expert_id", 2147483647, -kMaxInteger, kMaxInteger, "Last local expert, inclusive."),
          choice(
              "quantization", kQuantizations, 2,
              "static: by scales, if any. group: float8 by the largest magnitude of each 128 columns, NaN aside; 448 "
              "times the scale is that magnitude, or 1e-10 where it is smaller."),
          choice("scale_format", quantize::kScaleFormats, 2,
                 "Of the scales found: float32, or power_of_two, the next one up."),
          choice(
              "numerics", kNumericsChoices, 2,
              "fp32: float32 throughout, one final rounding. triton: the original kernel's arithmetic, the activation "
              "and each product rounded to the input dtype."),
      },
      validate,
      run_cpu,
  };
}

Problem problem_of(const Call &call, Function function) {
  Problem p;
  p.call = &call;
  p.input = call.data<const void>(kGateupOutput);
  p.input_dtype = call.dtypes[kGateupOutput];
  p.output = call.data<void>(kDownInput);
  p.output_dtype = call.dtypes[kDownInput];
  p.reorder_topk_ids = indices_of(call, kReorderTopkIds);
  p.scales = call.data<const float>(kScales);
  p.scale_count = call.axes[kScaleCount];
  p.masked_m = call.data<const int32_t>(kMaskedM);
  p.experts = call.axes[kExperts];
  p.output_scales = call.data<float>(kOutputScales);
  p.groups = call.axes[kGroups];
  p.quantises = call.integers[kQuantization] == 1;
  p.power_of_two = call.integers[kScaleFormat] == 1;
  p.numerics = static_cast<Numerics>(call.integers[kNumerics]);
  p.function = function;
  p.rows = call.axes[kRows];
  p.width = call.axes[kWidth];
  p.start_expert_id = call.integers[kStartExpertId];
  p.end_expert_id = call.integers[kEndExpertId];
  return p;
}

void run_cpu(const Problem &p) { Activation(p).run(); }

}  // namespace epmoe::gated_activation
