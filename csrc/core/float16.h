// float16 and bfloat16 on the CPU, by their bits: branch-free, so that loops over them vectorise on any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "epmoe.h"

#define EPMOE_INLINE inline __attribute__((always_inline))

namespace epmoe {

template <typename To, typename From>
EPMOE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Element types: storage plus exact widening and correctly rounded narrowing (to nearest, ties to even).
struct Float32 {
  using Storage = float;
  static constexpr int32_t kDtype = EPMOE_FLOAT32;
  static EPMOE_INLINE float widen(float x) { return x; }
  static EPMOE_INLINE float narrow(float x) { return x; }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int32_t kDtype = EPMOE_BFLOAT16;
  static EPMOE_INLINE float widen(uint16_t x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }
  static EPMOE_INLINE uint16_t narrow(float x) {
    const auto bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<uint16_t>(nan ? 0x7fffu : rounded);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int32_t kDtype = EPMOE_FLOAT16;
  static EPMOE_INLINE float widen(uint16_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
    const uint32_t magnitude = x & 0x7fffu;
    // Subnormals go through an integer conversion rather than a denormal float, which some threads flush to zero.
    const auto subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    const uint32_t special = (magnitude << 13) | 0x7f800000u;
    const uint32_t finite = magnitude < 0x400u ? subnormal : normal;
    return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : finite));
  }
  static EPMOE_INLINE uint16_t narrow(float x) {
    const auto bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 aligns a subnormal's last place with the float's, and the addition rounds to nearest even.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
    const uint32_t overflow = magnitude > 0x7f800000u ? 0x7fffu : 0x7c00u;
    return static_cast<uint16_t>(sign | (magnitude >= 0x477ff000u ? overflow : finite));
  }
};

// e4m3fn: no infinities, one NaN a sign, largest 448. Narrowing saturates, as the GPU's conversion does.
struct Float8 {
  using Storage = uint8_t;
  static constexpr int32_t kDtype = EPMOE_FLOAT8_E4M3FN;
  static EPMOE_INLINE float widen(uint8_t x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x80u) << 24;
    const uint32_t magnitude = x & 0x7fu;
    const auto subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t finite = magnitude < 8u ? subnormal : normal;
    return bit_cast<float>(sign | (magnitude == 0x7fu ? 0x7fc00000u : finite));
  }
  static EPMOE_INLINE uint8_t narrow(float x) {
    const auto bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 24) & 0x80u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    // Adding 2^14 aligns a subnormal's last place, 2^-9, with the float's, and the addition rounds to nearest even.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0x1p14f) - bit_cast<uint32_t>(0x1p14f);
    const uint32_t finite = magnitude < (121u << 23) ? subnormal : normal;
    const uint32_t saturated = magnitude > 0x43e00000u ? 0x7eu : finite;
    return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : saturated));
  }
};

// The double nearest to a*b + c with its last bit set when inexact ("round to odd"): rounding it once more to a format
// with at least two bits fewer gives the correctly rounded result, as a hardware fma of that format does. a*b must be
// exact in double, which holds for the products of float16 and bfloat16.
EPMOE_INLINE double fma_to_odd(double a, double b, double c) {
  const double product = a * b;
  const double sum = product + c;
  const double c_part = sum - product;
  const double error = (product - (sum - c_part)) + (c - c_part);
  const auto bits = bit_cast<uint64_t>(sum);
  const bool inexact = error != 0.0 && (bits & 1u) == 0u && std::fabs(sum) <= 1.7976931348623157e308;
  const bool away = (error > 0.0) == (sum > 0.0);
  return bit_cast<double>(inexact ? (away ? bits + 1 : bits - 1) : bits);
}

// Narrows a round-to-odd double to float, again to odd.
EPMOE_INLINE float narrow_to_odd(double x) {
  const auto nearest = static_cast<float>(x);
  const auto bits = bit_cast<uint32_t>(nearest);
  const bool exact = static_cast<double>(nearest) == x || x != x;
  const uint32_t toward_zero = std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? bits - 1 : bits;
  return bit_cast<float>(exact ? bits : (toward_zero | 1u));
}

// acc + x*w rounded once to the element type.
template <typename Element>
EPMOE_INLINE typename Element::Storage fma_rounded(typename Element::Storage x, typename Element::Storage w,
                                                   typename Element::Storage acc) {
  if constexpr (Element::kDtype == EPMOE_FLOAT32) {
    return std::fma(x, w, acc);
  } else {
    return Element::narrow(narrow_to_odd(fma_to_odd(Element::widen(x), Element::widen(w), Element::widen(acc))));
  }
}

}  // namespace epmoe
