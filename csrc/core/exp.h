// exp of a float on the CPU, branch-free, so that loops over it vectorise on any machine.
#pragma once

#include <cmath>

#include "core/float16.h"

namespace epmoe {

// e^-x for x in [0, 110], within about one unit in the last place; 0 where the float's subnormals end, near x = 104.
EPMOE_INLINE float exp_minus(float x) {
  // -x log2(e) = n + f, with log2(e) in two parts so that f is exact to the last place.
  const float shifted = std::fma(x, -0x1.715476p0f, 0x1.8p23f);
  const float n = shifted - 0x1.8p23f;
  const float f = std::fma(x, -0x1.4ae0cp-26f, std::fma(x, -0x1.715476p0f, -n));
  // 2^f, by the polynomial whose largest relative error over [-1/2, 1/2], 2^-28.5, is least.
  float p = 0x1.470b4ap-13f;
  p = std::fma(p, f, 0x1.5f7276p-10f);
  p = std::fma(p, f, 0x1.3b270ep-7f);
  p = std::fma(p, f, 0x1.c6ae72p-5f);
  p = std::fma(p, f, 0x1.ebfbe2p-3f);
  p = std::fma(p, f, 0x1.62e432p-1f);
  p = std::fma(p, f, 1.0f);
  // Times 2^n. The exponent reaches beyond those of a float, so 2^64 too much at first.
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) + 64u) << 23;
  return bit_cast<float>(bit_cast<uint32_t>(p) + exponent) * 0x1p-64f;
}

}  // namespace epmoe
