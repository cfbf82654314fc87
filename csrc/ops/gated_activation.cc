// The gated activation: its descriptor, and the CPU's half.
#include "ops/gated_activation.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

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
  const float size = std::fabs(g);
  const float finite = size < 110.0f ? size : 110.0f;  // beyond, exp is 0 anyway
  float power;
  if constexpr (kFunction == kSilu) {
    power = exp_float(-finite);
  } else {
    // exp magnifies the error of its argument, so 2u is kept in two parts: p, and the little that p lacks.
    const float inner = std::fma(0.044715f * finite * finite, finite, finite);
    const float p = inner * kTwoAlpha;
    const float lacking = std::fma(inner, kTwoAlphaRest, std::fma(inner, kTwoAlpha, -p));
    power = exp_float(-p);
    power = std::fma(power, -lacking, power);
  }
  const float away = power / (1.0f + power);
  return g > 0.0f ? (away == 0.0f ? g : std::fma(-g, away, g)) : g * away;
}

#define EPMOE_ACTIVATION_LOOPS(Element, suffix)                                                                       \
  template <Function kFunction>                                                                                       \
  EPMOE_INLINE void product(Element, float *out, const Element::Storage *gate, const Element::Storage *up,            \
                            int64_t n) {                                                                              \
    for (int64_t i = 0; i < n; ++i) out[i] = activate<kFunction>(Element::widen(gate[i])) * Element::widen(up[i]);    \
  }                                                                                                                   \
  template <Function kFunction>                                                                                       \
  EPMOE_INLINE void product_rounded(Element, float *out, const Element::Storage *gate, const Element::Storage *up,    \
                                    int64_t n) {                                                                      \
    for (int64_t i = 0; i < n; ++i) {                                                                                 \
      const float g = Element::widen(Element::narrow(activate<kFunction>(Element::widen(gate[i]))));                  \
      out[i] = Element::widen(Element::narrow(g * Element::widen(up[i])));                                            \
    }                                                                                                                 \
  }                                                                                                                   \
  EPMOE_SIMD void silu_##suffix(float *out, const Element::Storage *gate, const Element::Storage *up, bool rounded,   \
                                int64_t n) {                                                                          \
    if (rounded)                                                                                                      \
      product_rounded<kSilu>(Element(), out, gate, up, n);                                                            \
    else                                                                                                              \
      product<kSilu>(Element(), out, gate, up, n);                                                                    \
  }                                                                                                                   \
  EPMOE_SIMD void gelu_##suffix(float *out, const Element::Storage *gate, const Element::Storage *up, bool rounded,   \
                                int64_t n) {                                                                          \
    if (rounded)                                                                                                      \
      product_rounded<kGelu>(Element(), out, gate, up, n);                                                            \
    else                                                                                                              \
      product<kGelu>(Element(), out, gate, up, n);                                                                    \
  }                                                                                                                   \
  EPMOE_SIMD void scale_rounded_##suffix(float *x, float factor, int64_t n) {                                         \
    for (int64_t i = 0; i < n; ++i) x[i] = Element::widen(Element::narrow(x[i] * factor));                            \
  }                                                                                                                   \
  inline void activate_row(Element, Function f, float *out, const Element::Storage *gate, const Element::Storage *up, \
                           bool rounded, int64_t n) {                                                                 \
    (f == kSilu ? silu_##suffix : gelu_##suffix)(out, gate, up, rounded, n);                                          \
  }                                                                                                                   \
  inline void scale_rounded(Element, float *x, float factor, int64_t n) { scale_rounded_##suffix(x, factor, n); }

EPMOE_ACTIVATION_LOOPS(Float32, float32)
EPMOE_ACTIVATION_LOOPS(Float16, float16)
EPMOE_ACTIVATION_LOOPS(BFloat16, bfloat16)

template <typename Element>
class Activation {
 public:
  explicit Activation(const Problem &p) : p_(p) {}

  void run() {
    const int64_t each = p_.masked_m == nullptr ? p_.rows : p_.rows / p_.experts;
    parallel_for(p_.rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p_.width)),
                 [&](int64_t begin, int64_t end) {
                   std::vector<float> scratch(static_cast<size_t>(p_.width));
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
                     move(row, expert, scratch.data());
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
  using Storage = typename Element::Storage;

  void move(int64_t row, int64_t expert, float *y) const {
    const Storage *gate = static_cast<const Storage *>(p_.input) + row * 2 * p_.width;
    const bool rounded = p_.numerics == kTriton;
    activate_row(Element(), p_.function, y, gate, gate + p_.width, rounded, p_.width);
    if (p_.scales != nullptr) {
      const float scale = p_.scales[expert];
      if (rounded)
        scale_rounded(Element(), y, Element::widen(Element::narrow(1.0f / scale)), p_.width);
      else
        divide_row(y, y, scale, p_.width);
    }
    if (p_.quantises) {
      quantize::divide_by_scales(y, y, p_.width, quantize::kGroupSize, p_.power_of_two, rounded,
                                 p_.output_scales + row * p_.groups);
    }
    narrow_row(static_cast<char *>(p_.output) + row * p_.width * itemsize(p_.output_dtype), y, p_.output_dtype,
               p_.width);
  }

  const Problem &p_;
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

void run_cpu(const Problem &p) {
  switch (p.input_dtype) {
    case EPMOE_FLOAT32:
      return Activation<Float32>(p).run();
    case EPMOE_FLOAT16:
      return Activation<Float16>(p).run();
    default:
      return Activation<BFloat16>(p).run();
  }
}

}  // namespace epmoe::gated_activation
