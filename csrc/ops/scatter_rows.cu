// Rows to their slots on CUDA: a row is read once and written to each slot. The warps of a block resolve a token's
// slots together, one slot a lane, and hand the rows around by shuffles.
#include <algorithm>

#include "ops/quantize.cuh"
#include "ops/scatter_rows.h"

namespace epmoe::scatter_rows {
namespace {

using gpu::kOctet;
using Float8 = __nv_fp8_e4m3;

constexpr uint32_t kNoRow = 0xffffffffu;
constexpr unsigned kWarp = 0xffffffffu;

struct Arguments {
  const void *input;
  void *output;
  const void *src2dst;
  const void *topk_ids;
  const float *a1_scales;
  const float *input_scales;
  float *output_scales;
  cuda::StatusWord *status;
  int64_t tokens, scale_count;
  int64_t start_expert_id, end_expert_id, dst_start;
  uint32_t hidden, topk, row_count, groups;
  int32_t op_index, src2dst_param, ids_param;
  bool src2dst_int64, topk_ids_int64, scales_by_expert, power_of_two;
};

struct Slot {
  uint32_t row;
  float scale;
};

__device__ __forceinline__ Slot resolve_slot(const Arguments &a, int64_t token, uint32_t k) {
  const int64_t flat = token * a.topk + k;
  const int64_t destination = gpu::load_index(a.src2dst, a.src2dst_int64, flat);
  Slot slot{kNoRow, 1.0f};
  if (a.topk_ids != nullptr) {
    const int64_t id = gpu::load_index(a.topk_ids, a.topk_ids_int64, flat);
    if (id < a.start_expert_id || id > a.end_expert_id) return slot;
    if (a.scales_by_expert) {
      const int64_t expert = id - a.start_expert_id;
      if (expert >= a.scale_count) {
        gpu::report_index(a.status, a.op_index, a.ids_param, token, k, id, a.start_expert_id,
                          a.start_expert_id + a.scale_count);
        return slot;
      }
      slot.scale = __ldg(a.a1_scales + expert);
    }
  } else if (destination < 0) {
    return slot;
  }
  const uint64_t row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(a.dst_start);
  if (row >= a.row_count)
    gpu::report_index(a.status, a.op_index, a.src2dst_param, token, k, destination, a.dst_start,
                      a.dst_start + a.row_count);
  else
    slot.row = static_cast<uint32_t>(row);
  return slot;
}

// Calls body(row, scale) for every local slot of a token, all lanes of the warp together.
template <typename Body>
__device__ __forceinline__ void for_slots(const Arguments &a, int64_t token, const Body &body) {
  const unsigned lane = threadIdx.x % 32;
  for (uint32_t first = 0; first < a.topk; first += 32) {
    Slot mine{kNoRow, 1.0f};
    if (first + lane < a.topk) mine = resolve_slot(a, token, first + lane);
    for (unsigned locals = __ballot_sync(kWarp, mine.row != kNoRow); locals != 0; locals &= locals - 1) {
      const int k = __ffs(static_cast<int>(locals)) - 1;
      const uint32_t row = __shfl_sync(kWarp, mine.row, k);
      const float scale = __shfl_sync(kWarp, mine.scale, k);
      body(row, scale);
    }
  }
}

// Rows moved as they are, in units of what their alignment allows. `width` counts units in a row.
template <typename Unit>
__global__ void __launch_bounds__(gpu::kMaxThreads) copy_kernel(const Arguments a, uint32_t width) {
  const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
  const bool inside = column < width;
  const auto *input = static_cast<const Unit *>(a.input);
  auto *output = static_cast<Unit *>(a.output);
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    Unit data{};
    if (inside) data = __ldg(input + token * width + column);
    for_slots(a, token, [&](uint32_t row, float) {
      if (inside) output[static_cast<uint64_t>(row) * width + column] = data;
      if (a.input_scales != nullptr) {
        for (uint32_t g = column; g < a.groups; g += gridDim.x * blockDim.x) {
          a.output_scales[static_cast<uint64_t>(row) * a.groups + g] = __ldg(a.input_scales + token * a.groups + g);
        }
      }
    });
  }
}

// Rows converted on the way, eight columns a thread. kQuantization kGroup finds a scale for each 128 columns.
template <typename In, typename Out, bool kVectors, quantize::Quantization kQuantization, bool kTriton>
__global__ void __launch_bounds__(gpu::kMaxThreads) convert_kernel(const Arguments a) {
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * kOctet;
  const int count = static_cast<int>(min(static_cast<int64_t>(a.hidden) - column, static_cast<int64_t>(kOctet)));
  const auto *input = static_cast<const In *>(a.input) + column;
  auto *output = static_cast<Out *>(a.output) + column;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    float x[kOctet] = {};
    if (count > 0) gpu::load_octet<kVectors>(x, input + token * a.hidden, count);
    float y[kOctet];
    const auto scale_by = [&](float scale) {
      const float reciprocal = kTriton ? gpu::divide_approximately(1.0f, scale) : 0.0f;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = kTriton ? __fmul_rn(x[i], reciprocal) : __fdiv_rn(x[i], scale);
    };
    float group_scale = 0.0f;
    if constexpr (kQuantization == quantize::kGroup) {
      group_scale = gpu::float8_scale<kTriton>(gpu::group_max(gpu::absmax_of(x)), a.power_of_two);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = gpu::quantised<kTriton>(x[i], group_scale);
    } else if (a.a1_scales == nullptr) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = x[i];
    } else if (!a.scales_by_expert) {
      scale_by(__ldg(a.a1_scales + token));
    }
    for_slots(a, token, [&](uint32_t row, float scale) {
      if (kQuantization == quantize::kStatic && a.scales_by_expert) scale_by(scale);
      if (count > 0) gpu::store_octet<kVectors>(output + static_cast<uint64_t>(row) * a.hidden, y, count);
      if (kQuantization == quantize::kGroup && count > 0 && threadIdx.x % 16 == 0) {
        a.output_scales[static_cast<uint64_t>(row) * a.groups + column / quantize::kGroupSize] = group_scale;
      }
    });
  }
}

constexpr int kRowThreads = 1024;

// One block a token: its largest magnitude first, then the row again, of which a thread's first columns stay in
// registers (all of them up to 8192 columns).
template <typename In, bool kVectors, bool kTriton>
__global__ void __launch_bounds__(kRowThreads) quantise_row_kernel(const Arguments a) {
  __shared__ float warp_most[2][kRowThreads / 32];
  const uint32_t stride = blockDim.x * kOctet;
  int turn = 0;
  for (int64_t token = blockIdx.x; token < a.tokens; token += gridDim.x, turn ^= 1) {
    const auto *input = static_cast<const In *>(a.input) + token * a.hidden;
    const auto columns_at = [&](uint32_t column) {
      return static_cast<int>(min(static_cast<int64_t>(a.hidden) - column, static_cast<int64_t>(kOctet)));
    };
    const uint32_t first = threadIdx.x * kOctet;
    float x[kOctet] = {};
    if (first < a.hidden) gpu::load_octet<kVectors>(x, input + first, columns_at(first));
    float most = gpu::absmax_of(x);
    for (uint32_t column = first + stride; column < a.hidden; column += stride) {
      float later[kOctet];
      gpu::load_octet<kVectors>(later, input + column, columns_at(column));
      most = fmaxf(most, gpu::absmax_of(later));
    }
    most = gpu::group_max(most);
    most = fmaxf(most, __shfl_xor_sync(kWarp, most, 16));
    if (threadIdx.x % 32 == 0) warp_most[turn][threadIdx.x / 32] = most;
    __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) most = fmaxf(most, warp_most[turn][warp]);
    const float scale = gpu::float8_scale<kTriton>(most, a.power_of_two);

    // Uniform over the warp, whose lanes resolve slots together.
    for (uint32_t begin = 0; begin < a.hidden; begin += stride) {
      const uint32_t column = begin + first;
      const int count = column < a.hidden ? columns_at(column) : 0;
      if (begin > 0 && count > 0) gpu::load_octet<kVectors>(x, input + column, count);
      float y[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) y[i] = gpu::quantised<kTriton>(x[i], scale);
      for_slots(a, token, [&](uint32_t row, float) {
        auto *output = static_cast<Float8 *>(a.output) + static_cast<uint64_t>(row) * a.hidden + column;
        if (count > 0) gpu::store_octet<kVectors>(output, y, count);
        if (begin == 0 && threadIdx.x == 0) a.output_scales[row] = scale;
      });
    }
  }
}

using gpu::Kernel;
using gpu::kernel_of;

template <typename In, typename Out, bool kVectors, bool kTriton>
Kernel &for_quantization(quantize::Quantization quantization) {
  if constexpr (std::is_same_v<Out, Float8>) {
    if (quantization == quantize::kGroup) {
      return kernel_of<&convert_kernel<In, Out, kVectors, quantize::kGroup, kTriton>>();
    }
    if (quantization == quantize::kToken) return kernel_of<&quantise_row_kernel<In, kVectors, kTriton>>();
  }
  return kernel_of<&convert_kernel<In, Out, kVectors, quantize::kStatic, kTriton>>();
}

template <typename In, typename Out>
Kernel &for_types(const Problem &p, bool vectors) {
  if (p.numerics == kTriton) {
    return vectors ? for_quantization<In, Out, true, true>(p.quantization)
                   : for_quantization<In, Out, false, true>(p.quantization);
  }
  return vectors ? for_quantization<In, Out, true, false>(p.quantization)
                 : for_quantization<In, Out, false, false>(p.quantization);
}

template <typename In>
Kernel &for_input(const Problem &p, bool vectors) {
  if (p.output_dtype == EPMOE_FLOAT8_E4M3FN) return for_types<In, Float8>(p, vectors);
  return for_types<In, In>(p, vectors);
}

Kernel &choose(const Problem &p, bool vectors) {
  switch (p.input_dtype) {
    case EPMOE_FLOAT32:
      return for_input<float>(p, vectors);
    case EPMOE_FLOAT16:
      return for_input<__half>(p, vectors);
    default:
      return for_input<__nv_bfloat16>(p, vectors);
  }
}

bool divides(int64_t bytes, const Problem &p, int64_t row_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output);
  return (bits | static_cast<uintptr_t>(row_bytes)) % static_cast<uintptr_t>(bytes) == 0;
}

dim3 grid_of(int64_t tokens, int64_t columns, int threads) {
  return {static_cast<unsigned>((columns + threads - 1) / threads),
          static_cast<unsigned>(std::min<int64_t>(tokens, 65535))};
}

void launch_copy(const Problem &p, const Arguments &a) {
  const int64_t row_bytes = p.hidden * itemsize(p.input_dtype);
  const auto launch = [&](Kernel &kernel, int64_t unit) {
    const int64_t width = row_bytes / unit;
    const int threads = gpu::threads_for(width);
    kernel.launch(grid_of(p.tokens, width, threads), dim3(static_cast<unsigned>(threads)), p.call->stream, 0, a,
                  static_cast<uint32_t>(width));
  };
  if (divides(16, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint4>>(), 16);
  if (divides(4, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint32_t>>(), 4);
  if (divides(2, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint16_t>>(), 2);
  launch(kernel_of<&copy_kernel<uint8_t>>(), 1);
}

}  // namespace

void run_cuda(const Problem &p) {
  if (p.tokens == 0 || p.hidden == 0 || p.topk == 0) return;
  Arguments a{};
  a.input = p.input;
  a.output = p.output;
  a.src2dst = p.src2dst.data;
  a.topk_ids = p.topk_ids.data;
  a.a1_scales = p.a1_scales;
  a.input_scales = p.input_scales;
  a.output_scales = p.output_scales;
  a.status = cuda::status_word(p.call->device.device_id);
  a.tokens = p.tokens;
  a.scale_count = p.scale_count;
  a.start_expert_id = p.start_expert_id;
  a.end_expert_id = p.end_expert_id;
  a.dst_start = p.dst_start;
  a.hidden = static_cast<uint32_t>(p.hidden);
  a.topk = static_cast<uint32_t>(p.topk);
  a.row_count = static_cast<uint32_t>(p.row_count);
  a.groups = static_cast<uint32_t>(p.groups);
  a.op_index = p.call->entry->index;
  a.src2dst_param = p.src2dst_param;
  a.ids_param = p.ids_param;
  a.src2dst_int64 = p.src2dst.is_int64;
  a.topk_ids_int64 = p.topk_ids.is_int64;
  a.scales_by_expert = p.scales_by_expert();
  a.power_of_two = p.power_of_two;
  if (p.copies()) return launch_copy(p, a);

  const bool vectors = p.hidden % kOctet == 0 && divides(16, p, 0);
  const int64_t octets = (p.hidden + kOctet - 1) / kOctet;
  if (p.quantization == quantize::kToken) {
    const auto threads = static_cast<unsigned>(std::min<int64_t>(kRowThreads, (octets + 31) / 32 * 32));
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(p.tokens, INT32_MAX));
    return choose(p, vectors).launch(dim3(blocks), dim3(threads), p.call->stream, 0, a);
  }
  const int threads = gpu::threads_for(octets);
  choose(p, vectors)
      .launch(grid_of(p.tokens, octets, threads), dim3(static_cast<unsigned>(threads)), p.call->stream, 0, a);
}

}  // namespace epmoe::scatter_rows
