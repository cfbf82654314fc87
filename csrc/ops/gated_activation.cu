// The gated activation on CUDA: eight columns a thread, gate and up loaded together.
#include <algorithm>

#include "ops/gated_activation.h"
#include "ops/quantize.cuh"

namespace epmoe::gated_activation {
namespace {

using gpu::Element;
using gpu::kOctet;
using Float8 = __nv_fp8_e4m3;

struct Arguments {
  const void *input;
  void *output;
  const void *reorder_topk_ids;
  const float *scales;
  const int32_t *masked_m;
  float *output_scales;
  cuda::StatusWord *status;
  int64_t rows, rows_each, scale_count, start_expert_id, end_expert_id;
  uint32_t width, groups, zero;
  int32_t op_index;
  bool ids_int64, power_of_two, streams;
};

constexpr float kLog2E = 1.4426950408889634f;

// 1 + exp(x) as Triton has it: by 2^(x * log2(e)). What leaves float32's normal range is flushed: 1 is added to it.
__device__ __forceinline__ float one_plus_exp(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, kLog2E)));
  return __fadd_rn(1.0f, power);
}

// The default: g * logistic(g), or g * logistic(2u), as accurate as T can show: gelu's 1 + tanh(u) is twice the
// logistic function of 2u. For float32 as on the CPU, which see.
template <Function kFunction, typename T>
__device__ __forceinline__ float activate(float g) {
  if constexpr (sizeof(T) < 4) {
    const float argument = kFunction == kSilu ? g : kTwoAlpha * fmaf(0.044715f * g * g, g, g);
    return gpu::divide_by_large(g, one_plus_exp(-argument));
  } else {
    const float finite = fminf(fabsf(g), 110.0f);
    float power;
    if constexpr (kFunction == kSilu) {
      power = expf(-finite);
    } else {
      const float inner = fmaf(__fmul_rn(__fmul_rn(0.044715f, finite), finite), finite, finite);
      const float p = __fmul_rn(inner, kTwoAlpha);
      const float lacking = fmaf(inner, kTwoAlphaRest, fmaf(inner, kTwoAlpha, -p));
      power = expf(-p);
      power = fmaf(power, -lacking, power);
    }
    const float away = __fdiv_rn(power, 1.0f + power);
    return g > 0.0f ? (away == 0.0f ? g : fmaf(-g, away, g)) : g * away;
  }
}

// The original's: the order of operations matters to the last bit.
template <Function kFunction, bool kQuantises>
__device__ __forceinline__ float activate_as_triton(float g) {
  if constexpr (kFunction == kGelu) {
    const float argument = __fmul_rn(__fmaf_rn(__fmul_rn(__fmul_rn(g, 0.044715f), g), g, g), 0.7978845608028654f);
    const float logistic = gpu::divide_by_large(1.0f, one_plus_exp(-__fmul_rn(argument, 2.0f)));
    const float tanh = __fmaf_rn(logistic, 2.0f, -1.0f);
    return __fmul_rn(__fmul_rn(g, 0.5f), __fadd_rn(tanh, 1.0f));
  } else if constexpr (kQuantises) {
    return gpu::divide_by_large(g, one_plus_exp(-g));
  } else {
    return __fmul_rn(g, gpu::divide_by_large(1.0f, one_plus_exp(-g)));
  }
}

template <typename T>
__device__ __forceinline__ float round_to(float x) {
  return Element<T>::widen(Element<T>::narrow(x));
}

// act(gate) * up. The original rounds the activation to T and the product again, which a multiplication in T does.
template <Function kFunction, bool kQuantises, bool kTriton, typename T>
__device__ __forceinline__ void multiply(float (&y)[kOctet], const T (&gate)[kOctet], const T (&up)[kOctet]) {
  float g[kOctet];
  gpu::widen_octet(g, gate);
  if constexpr (!kTriton) {
    float u[kOctet];
    gpu::widen_octet(u, up);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) y[i] = __fmul_rn(activate<kFunction, T>(g[i]), u[i]);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) y[i] = __fmul_rn(activate_as_triton<kFunction, kQuantises>(g[i]), up[i]);
  } else {
    typename Element<T>::Pair factors[kOctet / 2];
    memcpy(factors, up, sizeof factors);
#pragma unroll
    for (int i = 0; i < kOctet; i += 2) {
      const float2 activated = make_float2(activate_as_triton<kFunction, kQuantises>(g[i]),
                                           activate_as_triton<kFunction, kQuantises>(g[i + 1]));
      const float2 both = Element<T>::widen(Element<T>::mul(Element<T>::narrow(activated), factors[i / 2]));
      y[i] = both.x;
      y[i + 1] = both.y;
    }
  }
}

// Makes `first` hang on `second` as well. To save registers ptxas loads the second when the original's arithmetic is
// through with the first, and waits twice. `zero` is 0, which the compiler must not know.
template <typename T>
__device__ __forceinline__ void use_together(T (&first)[kOctet], const T (&second)[kOctet], uint32_t zero) {
  constexpr int kWords = kOctet * sizeof(T) / 4;
  uint32_t word[kWords];
  uint32_t other[kWords];
  memcpy(word, first, sizeof word);
  memcpy(other, second, sizeof other);
#pragma unroll
  for (int i = 0; i < kWords; ++i) word[i] ^= other[i] & zero;
  memcpy(first, word, sizeof word);
}

// Whether a row is active; finds its divisor.
__device__ __forceinline__ bool active(const Arguments &a, int64_t row, float &scale) {
  if (a.reorder_topk_ids == nullptr) return true;
  const int64_t id = gpu::load_index(a.reorder_topk_ids, a.ids_int64, row);
  if (id < a.start_expert_id || id > a.end_expert_id) return false;
  if (a.scales == nullptr) return true;
  const int64_t expert = id - a.start_expert_id;
  if (expert >= a.scale_count) {
    gpu::report_index(a.status, a.op_index, kReorderTopkIds, row, 0, id, a.start_expert_id,
                      a.start_expert_id + a.scale_count);
    return false;
  }
  scale = __ldg(a.scales + expert);
  return true;
}

template <typename T, typename Out, bool kVectors, Function kFunction, bool kQuantises, bool kTriton>
__device__ __forceinline__ void move_row(const Arguments &a, int64_t row, float scale, uint32_t column) {
  const int count = static_cast<int>(min(static_cast<int64_t>(a.width) - column, static_cast<int64_t>(kOctet)));
  float y[kOctet] = {};
  if (count > 0) {
    const T *input = static_cast<const T *>(a.input) + row * 2 * a.width + column;
    T gate[kOctet];
    T up[kOctet];
    gpu::load_octet<kVectors>(gate, input, count);
    gpu::load_octet<kVectors>(up, input + a.width, count);
    if constexpr (kVectors && kTriton && !kQuantises) use_together(gate, up, a.zero);
    multiply<kFunction, kQuantises, kTriton, T>(y, gate, up);
  }
  if constexpr (kQuantises) {
    const float group_scale = gpu::float8_scale<kTriton>(gpu::group_max(gpu::absmax_of(y)), a.power_of_two);
    gpu::quantise<kTriton>(y, y, group_scale);
    if (count > 0 && threadIdx.x % 16 == 0) {
      a.output_scales[row * a.groups + column / quantize::kGroupSize] = group_scale;
    }
  } else if (a.scales != nullptr) {
    const float factor = kTriton ? round_to<T>(gpu::divide_approximately(1.0f, scale)) : 0.0f;
    const gpu::Divisor<false> by(scale);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) y[i] = kTriton ? round_to<T>(__fmul_rn(y[i], factor)) : by.divide(y[i]);
  }
  if (count > 0) gpu::store_octet<kVectors>(static_cast<Out *>(a.output) + row * a.width + column, y, count, a.streams);
}

// Blocks an SM: one full of warps, at 32 registers a thread, but for float32's exponential.
template <typename T>
constexpr int kMinBlocks = sizeof(T) == 4 ? 12 : 16;

// Grid: x covers the columns, y rows (and strides), z experts when only the first rows of each are active.
template <typename T, typename Out, bool kVectors, Function kFunction, bool kQuantises, bool kTriton>
__global__ void __launch_bounds__(gpu::kMaxThreads, kMinBlocks<T>) kernel(const Arguments a) {
  gpu::wait_for_earlier_work();
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * kOctet;
  int64_t begin = 0;
  int64_t end = a.rows;
  if (a.masked_m != nullptr) {
    const int32_t masked = __ldg(a.masked_m + blockIdx.z);
    if (masked < 0 || masked > a.rows_each) {
      gpu::report_index(a.status, a.op_index, kMaskedM, blockIdx.z, 0, masked, 0, a.rows_each + 1);
    }
    begin = blockIdx.z * a.rows_each;
    end = begin + min(static_cast<int64_t>(max(masked, 0)), a.rows_each);
  }
  for (int64_t row = begin + blockIdx.y; row < end; row += gridDim.y) {
    float scale = 1.0f;
    if (active(a, row, scale)) move_row<T, Out, kVectors, kFunction, kQuantises, kTriton>(a, row, scale, column);
  }
}

using gpu::Kernel;
using gpu::kernel_of;

template <typename T, typename Out, bool kVectors, Function kFunction>
Kernel &for_numerics(const Problem &p) {
  if constexpr (std::is_same_v<Out, Float8>) {
    if (p.quantises) {
      return p.numerics == kTriton ? kernel_of<&kernel<T, Out, kVectors, kFunction, true, true>>()
                                   : kernel_of<&kernel<T, Out, kVectors, kFunction, true, false>>();
    }
  }
  return p.numerics == kTriton ? kernel_of<&kernel<T, Out, kVectors, kFunction, false, true>>()
                               : kernel_of<&kernel<T, Out, kVectors, kFunction, false, false>>();
}

template <typename T, typename Out>
Kernel &for_function(const Problem &p, bool vectors) {
  if (p.function == kSilu)
    return vectors ? for_numerics<T, Out, true, kSilu>(p) : for_numerics<T, Out, false, kSilu>(p);
  return vectors ? for_numerics<T, Out, true, kGelu>(p) : for_numerics<T, Out, false, kGelu>(p);
}

template <typename T>
Kernel &for_output(const Problem &p, bool vectors) {
  if (p.output_dtype == EPMOE_FLOAT8_E4M3FN) return for_function<T, Float8>(p, vectors);
  return for_function<T, T>(p, vectors);
}

Kernel &choose(const Problem &p, bool vectors) {
  switch (p.input_dtype) {
    case EPMOE_FLOAT32:
      return for_output<float>(p, vectors);
    case EPMOE_FLOAT16:
      return for_output<__half>(p, vectors);
    default:
      return for_output<__nv_bfloat16>(p, vectors);
  }
}

}  // namespace

void run_cuda(const Problem &p) {
  const int32_t device = p.call->device.device_id;
  Arguments a{};
  a.input = p.input;
  a.output = p.output;
  a.reorder_topk_ids = p.reorder_topk_ids.data;
  a.scales = p.scales;
  a.masked_m = p.masked_m;
  a.output_scales = p.output_scales;
  a.status = cuda::status_word(device);
  a.rows = p.rows;
  a.rows_each = p.masked_m == nullptr ? p.rows : p.rows / p.experts;
  a.scale_count = p.scale_count;
  a.start_expert_id = p.start_expert_id;
  a.end_expert_id = p.end_expert_id;
  a.width = static_cast<uint32_t>(p.width);
  a.groups = static_cast<uint32_t>(p.groups);
  a.op_index = p.call->entry->index;
  a.ids_int64 = p.reorder_topk_ids.is_int64;
  a.power_of_two = p.power_of_two;
  // As in gather_sum.cu: what exceeds L2 by little displaces nothing when it streams.
  const int64_t bytes = p.rows * p.width * (2 * itemsize(p.input_dtype) + itemsize(p.output_dtype));
  const int64_t l2_bytes = cuda::facts(device).l2_bytes;
  a.streams = bytes > l2_bytes && bytes <= 4 * l2_bytes;

  const bool vectors = p.width % kOctet == 0 && gpu::aligned16(p.input) && gpu::aligned16(p.output);
  const int64_t octets = (p.width + kOctet - 1) / kOctet;
  const int threads = gpu::threads_for(octets);
  const int64_t chunks = (octets + threads - 1) / threads;
  int64_t rows = a.rows_each;
  if (p.masked_m != nullptr) {
    // Most rows of most experts are not active: a few blocks an expert stride over those that are.
    const int64_t wanted = cuda::facts(device).sm_count * 16 / (chunks * p.experts) + 1;
    rows = std::min(rows, wanted);
  }
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(std::min<int64_t>(rows, 65535)),
                  p.masked_m == nullptr ? 1u : static_cast<unsigned>(p.experts));
  choose(p, vectors).launch(*p.call, grid, dim3(static_cast<unsigned>(threads)), 0, a);
}

}  // namespace epmoe::gated_activation
