// Conversion to float8 and its scales on CUDA.
#pragma once

#include <cuda_fp8.h>

#include "ops/common.cuh"
#include "ops/quantize.h"

namespace epmoe::gpu {

// Triton's float32 division: about two units in the last place.
__device__ __forceinline__ float divide_approximately(float a, float b) {
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}

// divide_approximately(a, b) for a b of at least 1, or a NaN, bit for bit: div.full.f32 without its care for small
// ones.
__device__ __forceinline__ float divide_by_large(float a, float b) {
  const float down = b > 0x1p126f ? 0.25f : 1.0f;
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(__fmul_rn(b, down)));
  return __fmul_rn(__fmul_rn(a, down), reciprocal);
}

// Divides many values by one: as the original does, or correctly rounded by a reciprocal and one correction, which is
// exact while nothing leaves the middle of float32's range (Markstein), and by division elsewhere.
template <bool kTriton>
class Divisor {
 public:
  __device__ explicit Divisor(float divisor) : divisor_(divisor) {
    if constexpr (!kTriton) reciprocal_ = __frcp_rn(divisor);
  }

  __device__ float divide(float value) const {
    if constexpr (kTriton) return divide_approximately(value, divisor_);
    const float quotient = __fmul_rn(value, reciprocal_);
    if (!(moderate(divisor_) && moderate(quotient))) return __fdiv_rn(value, divisor_);
    return __fmaf_rn(__fmaf_rn(-quotient, divisor_, value), reciprocal_, quotient);
  }

 private:
  static __device__ bool moderate(float x) { return fabsf(x) > 0x1p-50f && fabsf(x) < 0x1p50f; }

  float divisor_;
  float reciprocal_ = 0.0f;
};

// The scale under which values up to `absmax` fit float8. By the reciprocal of 448 and one correction, which is exact
// for every float32 of that size; infinity would make it NaN.
template <bool kTriton>
__device__ __forceinline__ float float8_scale(float absmax, bool power_of_two) {
  const float most = fmaxf(absmax, quantize::kLeastAbsmax);
  float scale;
  if constexpr (kTriton) {
    scale = divide_approximately(most, quantize::kLargest);
  } else {
    constexpr float kReciprocal = 1.0f / quantize::kLargest;
    const float quotient = __fmul_rn(most, kReciprocal);
    const float corrected = __fmaf_rn(__fmaf_rn(-quotient, quantize::kLargest, most), kReciprocal, quotient);
    scale = isinf(most) ? most : corrected;
  }
  const uint32_t bits = __float_as_uint(scale);
  if (!power_of_two || (bits & 0x7fffffu) == 0) return scale;
  return __uint_as_float((bits + 0x800000u) & 0xff800000u);
}

// Quotients in the range of float8, by a scale that float8_scale() gave. The original's clamp turns a NaN into its
// lower bound. The default divides as Divisor does without its branches: such a scale is moderate or infinite, where a
// quotient is 0 or NaN, and a quotient that is not moderate becomes a zero, of which the sign alone counts.
template <bool kTriton, int N>
__device__ __forceinline__ void quantise(float (&out)[N], const float (&in)[N], float scale) {
  if constexpr (kTriton) {
    float reciprocal;  // all that div.full.f32 does with such a scale
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(scale));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = fminf(fmaxf(__fmul_rn(in[i], reciprocal), -quantize::kLargest), quantize::kLargest);
    }
  } else {
    const float reciprocal = __frcp_rn(scale);
    const float finite = fminf(scale, 3.4028234663852886e38f);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float quotient = __fmul_rn(in[i], reciprocal);
      out[i] = copysignf(__fmaf_rn(__fmaf_rn(-quotient, finite, in[i]), reciprocal, quotient), in[i]);
    }
  }
}

// Eight consecutive elements, loaded and stored by vectors, or one by one up to `count` of them; as they lie in memory,
// and as float32.
constexpr int kOctet = 8;

template <bool kVectors, typename T>
__device__ __forceinline__ void load_octet(T (&out)[kOctet], const T *source, int count) {
  if constexpr (kVectors) {
    constexpr int kLanes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kOctet / kLanes; ++i) {
      const auto part = load<CachePolicy::kCached, T, kLanes>(source + i * kLanes);
      memcpy(&out[i * kLanes], part.word, sizeof part.word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) out[i] = i < count ? source[i] : T{};
  }
}

template <typename T>
__device__ __forceinline__ void widen_octet(float (&out)[kOctet], const T (&in)[kOctet]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) out[i] = in[i];
  } else {
    typename Element<T>::Pair pairs[kOctet / 2];
    memcpy(pairs, in, sizeof pairs);
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      const float2 both = Element<T>::widen(pairs[i / 2]);
      out[i] = both.x;
      out[i + 1] = both.y;
    }
  }
}

// `streams`: what is stored leaves the caches first.
template <bool kVectors, typename T>
__device__ __forceinline__ void store_octet(T *destination, const float (&in)[kOctet], int count, bool streams) {
  if constexpr (kVectors) {
    constexpr int kLanes = 16 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kOctet / kLanes; ++i) {
      float part[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) part[j] = in[i * kLanes + j];
      Vector<T, kLanes> vector;
      vector.narrow(part);
      if (streams)
        store<CachePolicy::kStreaming, T, kLanes>(destination + i * kLanes, vector);
      else
        store<CachePolicy::kCached, T, kLanes>(destination + i * kLanes, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) destination[i] = Element<T>::narrow(in[i]);
    }
  }
}

__device__ __forceinline__ uint2 float8_octet(const float (&in)[kOctet]) {
  uint32_t pair[kOctet / 2];
#pragma unroll
  for (int i = 0; i < kOctet / 2; ++i) {
    pair[i] = __nv_cvt_float2_to_fp8x2(make_float2(in[2 * i], in[2 * i + 1]), __NV_SATFINITE, __NV_E4M3);
  }
  return make_uint2(pair[0] | pair[1] << 16, pair[2] | pair[3] << 16);
}

template <bool kVectors>
__device__ __forceinline__ void store_octet(__nv_fp8_e4m3 *destination, uint2 bits, int count, bool streams) {
  if constexpr (kVectors) {
    if (streams)
      __stcs(reinterpret_cast<uint2 *>(destination), bits);
    else
      *reinterpret_cast<uint2 *>(destination) = bits;
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (i < count) destination[i].__x = static_cast<uint8_t>((i < 4 ? bits.x : bits.y) >> 8 * (i % 4));
    }
  }
}

template <bool kVectors>
__device__ __forceinline__ void store_octet(__nv_fp8_e4m3 *destination, const float (&in)[kOctet], int count,
                                            bool streams) {
  store_octet<kVectors>(destination, float8_octet(in), count, streams);
}

// The largest magnitude of eight elements, NaN aside.
__device__ __forceinline__ float absmax_of(const float (&x)[kOctet]) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) most = fmaxf(most, fabsf(x[i]));
  return most;
}

// The largest over 16 neighbouring lanes, which hold a group of 128 columns.
__device__ __forceinline__ float group_max(float most) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
  return most;
}

}  // namespace epmoe::gpu
