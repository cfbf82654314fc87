// The choices that ops with float8 output share, and their scales on the CPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/convert.h"
#include "core/float16.h"

namespace epmoe::quantize {

enum Quantization { kStatic, kToken, kGroup };
constexpr const char *kScaleFormats[] = {"float32", "power_of_two"};

constexpr int64_t kGroupSize = 128;
constexpr float kLargest = 448.0f;      // of float8_e4m3fn
constexpr float kLeastAbsmax = 1e-10f;  // rows of zeros get a scale that divides

inline int64_t groups_of(int64_t columns) { return (columns + kGroupSize - 1) / kGroupSize; }

// What a call whose op is to find the scales has; strings name its arguments and the ways it may be asked.
struct Request {
  const char *input, *output, *divisors;
  const char *ways;           // "'token' and 'group' find"
  const char *one_scale_for;  // how many scales there are, in words
  int32_t output_dtype;
  bool divisors_given;
  const float *output_scales;
  int64_t groups, expected_groups;
};

void check(const Request &request);

// The scale under which values up to `absmax` fit float8.
inline float scale_of(float absmax, bool power_of_two) {
  const float scale = std::max(absmax, kLeastAbsmax) / kLargest;
  if (!power_of_two) return scale;
  const auto bits = bit_cast<uint32_t>(scale);
  return bit_cast<float>((bits & 0x7fffffu) != 0 ? (bits + 0x800000u) & 0xff800000u : bits);
}

// Finds a scale for each `size` values, and divides them by it. In place where `out` is `in`. `clamp`: as the original,
// whose clamp makes the lower bound of a NaN.
inline void divide_by_scales(float *out, const float *in, int64_t n, int64_t size, bool power_of_two, bool clamp,
                             float *scales) {
  for (int64_t first = 0; first < n; first += size) {
    const int64_t count = std::min(size, n - first);
    const float scale = scale_of(absmax_of_row(in + first, count), power_of_two);
    *scales++ = scale;
    divide_row(out + first, in + first, scale, count);
  }
  for (int64_t i = 0; clamp && i < n; ++i) out[i] = out[i] > -kLargest ? std::min(out[i], kLargest) : -kLargest;
}

}  // namespace epmoe::quantize
