// Rows of any float dtype to float32 and back on the CPU, by loops that use whatever vectors the machine has.
#pragma once

#include <cstdint>

namespace epmoe {

// `dtype`: float32, float16, bfloat16 or float8_e4m3fn.
void widen_row(float *out, const void *in, int32_t dtype, int64_t n);
// Rounds to nearest even; float8 saturates.
void narrow_row(void *out, const float *in, int32_t dtype, int64_t n);

void divide_row(float *out, const float *in, float divisor, int64_t n);
// The largest magnitude, NaN aside.
float absmax_of_row(const float *in, int64_t n);

}  // namespace epmoe
