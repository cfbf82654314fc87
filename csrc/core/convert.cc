#include "core/convert.h"

#include "core/float16.h"
#include "core/simd.h"

namespace epmoe {
namespace {

#define EPMOE_CONVERT_LOOPS(Element, suffix)                                           \
  EPMOE_SIMD void widen_##suffix(float *out, const Element::Storage *in, int64_t n) {  \
    for (int64_t i = 0; i < n; ++i) out[i] = Element::widen(in[i]);                    \
  }                                                                                    \
  EPMOE_SIMD void narrow_##suffix(Element::Storage *out, const float *in, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) out[i] = Element::narrow(in[i]);                   \
  }
EPMOE_CONVERT_LOOPS(Float32, float32)
EPMOE_CONVERT_LOOPS(Float16, float16)
EPMOE_CONVERT_LOOPS(BFloat16, bfloat16)
EPMOE_CONVERT_LOOPS(Float8, float8)

EPMOE_SIMD void divide(float *out, const float *in, float divisor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] / divisor;
}

EPMOE_SIMD float absmax(const float *in, int64_t n) {
  uint32_t most = 0;  // magnitudes have the order of their bits, of which a maximum needs no order of evaluation
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = bit_cast<uint32_t>(in[i]) & 0x7fffffffu;
    const uint32_t number = magnitude > 0x7f800000u ? 0u : magnitude;
    most = number > most ? number : most;
  }
  return bit_cast<float>(most);
}

}  // namespace

void widen_row(float *out, const void *in, int32_t dtype, int64_t n) {
  switch (dtype) {
    case EPMOE_FLOAT32:
      return widen_float32(out, static_cast<const float *>(in), n);
    case EPMOE_FLOAT16:
      return widen_float16(out, static_cast<const uint16_t *>(in), n);
    case EPMOE_BFLOAT16:
      return widen_bfloat16(out, static_cast<const uint16_t *>(in), n);
    default:
      return widen_float8(out, static_cast<const uint8_t *>(in), n);
  }
}

void narrow_row(void *out, const float *in, int32_t dtype, int64_t n) {
  switch (dtype) {
    case EPMOE_FLOAT32:
      return narrow_float32(static_cast<float *>(out), in, n);
    case EPMOE_FLOAT16:
      return narrow_float16(static_cast<uint16_t *>(out), in, n);
    case EPMOE_BFLOAT16:
      return narrow_bfloat16(static_cast<uint16_t *>(out), in, n);
    default:
      return narrow_float8(static_cast<uint8_t *>(out), in, n);
  }
}

void divide_row(float *out, const float *in, float divisor, int64_t n) { divide(out, in, divisor, n); }
float absmax_of_row(const float *in, int64_t n) { return absmax(in, n); }

}  // namespace epmoe
