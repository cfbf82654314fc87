// exp of a float on the CPU, branch-free, so that loops over it vectorise on any machine.
#pragma once

#include <cmath>

#include "core/float16.h"

namespace epmoe {

// Within about one unit in the last place; 0 below the subnormals, infinity above the largest float, NaN for NaN.
EPMOE_INLINE float exp_float(float x) {
  const float clamped = x < -104.0f ? -104.0f : (x > 89.0f ? 89.0f : x);
  // x = n ln 2 + r, with ln 2 in two parts so that r is exact to the last place.
  const float shifted = std::fma(clamped, 1.44269504f, 0x1.8p23f);
  const float n = shifted - 0x1.8p23f;
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, clamped));
  float p = 1.0f / 5040.0f;
  p = std::fma(p, r, 1.0f / 720.0f);
  p = std::fma(p, r, 1.0f / 120.0f);
  p = std::fma(p, r, 1.0f / 24.0f);
  p = std::fma(p, r, 1.0f / 6.0f);
  p = std::fma(p, r, 0.5f);
  p = std::fma(p, r * r, r) + 1.0f;
  // 2^n in two factors, since n reaches beyond the exponents of a float on both sides.
  const auto whole = static_cast<int32_t>(bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(0x1.8p23f));
  const int32_t half = whole / 2;
  const auto power = [](int32_t e) { return bit_cast<float>(static_cast<uint32_t>(e + 127) << 23); };
  const float result = p * power(half) * power(whole - half);
  return x != x ? x : result;
}

}  // namespace epmoe
