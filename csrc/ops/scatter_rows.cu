// Rows to their slots on CUDA: a row is read once and written to each slot. The warps of a block resolve a token's
// slots together, one slot a lane, and hand the rows around by shuffles. What exceeds L2 is moved by Hopper's bulk
// copies where there are such, a row at a time, and displaces nothing there.
#include <algorithm>

#include "ops/bulk.cuh"
#include "ops/scatter_rows.cuh"

namespace epmoe::scatter_rows {
namespace {

// The scales that come with quantised rows, by the threads of a row's blocks from `first` on in steps of `step`.
__device__ __forceinline__ void copy_scales(const Arguments &a, int64_t token, const Slots &slots, uint32_t first,
                                            uint32_t step) {
  if (a.input_scales == nullptr) return;
  for_slots(slots, [&](uint32_t row, float) {
    for (uint32_t g = first; g < a.groups; g += step) {
      a.output_scales[static_cast<uint64_t>(row) * a.groups + g] = __ldg(a.input_scales + token * a.groups + g);
    }
  });
}

// Rows moved as they are, in units of what their alignment allows. `width` counts units in a row. Of tokens whose slots
// are all remote the row is read for nothing: waiting for the slots first takes longer where rows come from L2.
template <typename Unit>
__global__ void __launch_bounds__(gpu::kMaxThreads) copy_kernel(const Arguments a, uint32_t width) {
  gpu::wait_for_earlier_work();
  const uint32_t column = blockIdx.x * blockDim.x + threadIdx.x;
  const bool inside = column < width;
  const auto *input = static_cast<const Unit *>(a.input);
  auto *output = static_cast<Unit *>(a.output);
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    Unit data{};
    if (inside) data = __ldg(input + token * width + column);
    for_lanes(a, token, [&](const Slots &slots) {
      for_slots(slots, [&](uint32_t row, float) {
        if (inside) output[static_cast<uint64_t>(row) * width + column] = data;
      });
      copy_scales(a, token, slots, column, gridDim.x * blockDim.x);
    });
  }
}

// The same by one warp: `part` bytes of a row (block x) to shared memory, and from there to each slot.
__global__ void __launch_bounds__(32) bulk_copy_kernel(const Arguments a, uint32_t row_bytes, uint32_t part) {
  extern __shared__ __align__(128) uint8_t buffer[];
  __shared__ __align__(8) uint64_t barrier;
  gpu::bulk::Loader loader(&barrier);
  const gpu::bulk::Storer storer;
  gpu::wait_for_earlier_work();
  const uint32_t offset = blockIdx.x * part;
  const uint32_t bytes = min(part, row_bytes - offset);
  const auto *input = static_cast<const uint8_t *>(a.input) + offset;
  auto *output = static_cast<uint8_t *>(a.output) + offset;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    bool loaded = false;
    for_lanes(a, token, [&](const Slots &slots) {
      if (!loaded) loader.load(buffer, input + token * row_bytes, bytes);
      loaded = true;
      const uint32_t row = slots.mine.row;
      if (row != kNoRow) storer.store(output + static_cast<uint64_t>(row) * row_bytes, buffer, bytes);
      if (blockIdx.x == 0) copy_scales(a, token, slots, threadIdx.x, 32);
    });
    gpu::bulk::Storer::wait();
    __syncwarp();
  }
}

// y = x divided by a scale, as the original divides.
template <bool kTriton>
__device__ __forceinline__ void scale_by(float (&y)[kOctet], const float (&x)[kOctet], float scale) {
  const float reciprocal = kTriton ? gpu::divide_approximately(1.0f, scale) : 0.0f;
  const gpu::Divisor<false> by(scale);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) y[i] = kTriton ? __fmul_rn(x[i], reciprocal) : by.divide(x[i]);
}

// What all slots of a token share of a conversion by columns: the values in y, and the scale of a group of 128.
template <quantize::Quantization kQuantization, bool kTriton>
__device__ __forceinline__ float convert(const Arguments &a, int64_t token, float (&y)[kOctet],
                                         const float (&x)[kOctet]) {
  if constexpr (kQuantization == quantize::kGroup) {
    const float scale = gpu::float8_scale<kTriton>(gpu::group_max(gpu::absmax_of(x)), a.power_of_two);
    gpu::quantise<kTriton>(y, x, scale);
    return scale;
  }
  if (a.a1_scales != nullptr && !a.scales_by_expert) {
    scale_by<kTriton>(y, x, __ldg(a.a1_scales + token));
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) y[i] = x[i];
  }
  return 1.0f;
}

__device__ __forceinline__ int columns_at(const Arguments &a, uint32_t column) {
  return static_cast<int>(min(static_cast<int64_t>(a.hidden) - column, static_cast<int64_t>(kOctet)));
}

// Rows converted on the way, eight columns a thread. kQuantization kGroup finds a scale for each 128 columns.
template <typename In, typename Out, bool kVectors, quantize::Quantization kQuantization, bool kTriton>
__global__ void __launch_bounds__(gpu::kMaxThreads) convert_kernel(const Arguments a) {
  gpu::wait_for_earlier_work();
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * kOctet;
  const int count = columns_at(a, column);
  const auto *input = static_cast<const In *>(a.input) + column;
  auto *output = static_cast<Out *>(a.output) + column;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    In row_of_token[kOctet] = {};
    const auto load = [&] {
      if (count > 0) gpu::load_octet<kVectors>(row_of_token, input + token * a.hidden, count);
    };
    if (!a.streams) load();
    for_lanes(a, token, [&](const Slots &slots) {
      if (a.streams) load();
      float x[kOctet];
      gpu::widen_octet(x, row_of_token);
      float y[kOctet];
      const float group_scale = convert<kQuantization, kTriton>(a, token, y, x);
      for_slots(slots, [&](uint32_t row, float scale) {
        if (kQuantization == quantize::kStatic && a.scales_by_expert) scale_by<kTriton>(y, x, scale);
        if (count > 0) gpu::store_octet<kVectors>(output + static_cast<uint64_t>(row) * a.hidden, y, count, a.streams);
        if (kQuantization == quantize::kGroup && count > 0 && threadIdx.x % 16 == 0) {
          a.output_scales[static_cast<uint64_t>(row) * a.groups + column / quantize::kGroupSize] = group_scale;
        }
      });
    });
  }
}

constexpr int kRowThreads = 256;
constexpr int kRowOctets = 4;  // of a thread, in registers as they were loaded

// The largest magnitude of the row that the block has, of which each thread gives its own.
__device__ __forceinline__ float block_max(float most) {
  __shared__ float warp_most[kRowThreads / 32];
  most = gpu::group_max(most);
  most = fmaxf(most, __shfl_xor_sync(kWarp, most, 16));
  if (threadIdx.x % 32 == 0) warp_most[threadIdx.x / 32] = most;
  __syncthreads();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) most = fmaxf(most, warp_most[warp]);
  return most;
}

// Rows quantised, one block each, with a scale for each token or, kGroup, each 128 columns. Up to 8192 columns the row
// stays in registers between the search for the largest magnitude and the division; of longer ones the rest is read
// again.
template <typename In, bool kVectors, bool kGroup, bool kTriton>
__global__ void __launch_bounds__(kRowThreads, sizeof(In) == 4 ? 4 : 5) quantise_row_kernel(const Arguments a) {
  gpu::wait_for_earlier_work();
  const int64_t token = blockIdx.x;
  bool local = false;
  for_lanes(a, token, [&](const Slots &) { local = true; });
  if (!local) return;
  const auto *input = static_cast<const In *>(a.input) + token * a.hidden;
  const uint32_t stride = blockDim.x * kOctet;
  const uint32_t first = threadIdx.x * kOctet;
  const auto load = [&](In(&raw)[kOctet], uint32_t column) {
    if (column < a.hidden) gpu::load_octet<kVectors>(raw, input + column, columns_at(a, column));
  };
  const auto absmax_of = [](const In(&raw)[kOctet]) {
    float x[kOctet];
    gpu::widen_octet(x, raw);
    return gpu::absmax_of(x);
  };
  In raw[kRowOctets][kOctet] = {};
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) load(raw[i], first + i * stride);
  float of_token = 0.0f;
  if constexpr (!kGroup) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowOctets; ++i) most = fmaxf(most, absmax_of(raw[i]));
#pragma unroll 1
    for (uint32_t column = first + kRowOctets * stride; column < a.hidden; column += stride) {
      In later[kOctet] = {};
      load(later, column);
      most = fmaxf(most, absmax_of(later));
    }
    of_token = gpu::float8_scale<kTriton>(block_max(most), a.power_of_two);
  }

  const auto quantised = [&](const In(&values)[kOctet], float &scale) {
    scale = kGroup ? gpu::float8_scale<kTriton>(gpu::group_max(absmax_of(values)), a.power_of_two) : of_token;
    float x[kOctet];
    gpu::widen_octet(x, values);
    gpu::quantise<kTriton>(x, x, scale);
    return gpu::float8_octet(x);
  };
  const auto store = [&](uint32_t row, uint32_t column, uint2 bits, float scale) {
    if (column >= a.hidden) return;
    auto *output = static_cast<Float8 *>(a.output) + static_cast<uint64_t>(row) * a.hidden + column;
    gpu::store_octet<kVectors>(output, bits, columns_at(a, column), a.streams);
    if (kGroup && threadIdx.x % 16 == 0) {
      a.output_scales[static_cast<uint64_t>(row) * a.groups + column / quantize::kGroupSize] = scale;
    }
    if (!kGroup && column == 0) a.output_scales[row] = scale;
  };
  uint2 bits[kRowOctets];
  float scale[kRowOctets];
#pragma unroll
  for (int i = 0; i < kRowOctets; ++i) bits[i] = quantised(raw[i], scale[i]);
  for_lanes(a, token, [&](const Slots &slots) {
    for_slots(slots, [&](uint32_t row, float) {
#pragma unroll
      for (int i = 0; i < kRowOctets; ++i) store(row, first + i * stride, bits[i], scale[i]);
    });
  });
#pragma unroll 1
  for (uint32_t begin = kRowOctets * stride; begin < a.hidden; begin += stride) {  // whole warps resolve slots
    In later[kOctet] = {};
    load(later, begin + first);
    float its;
    const uint2 more = quantised(later, its);
    for_lanes(a, token, [&](const Slots &slots) {
      for_slots(slots, [&](uint32_t row, float) { store(row, begin + first, more, its); });
    });
  }
}

using gpu::Kernel;
using gpu::kernel_of;

template <typename In, typename Out, quantize::Quantization kQuantization, bool kTriton>
Kernel &by_columns(bool vectors) {
  return vectors ? kernel_of<&convert_kernel<In, Out, true, kQuantization, kTriton>>()
                 : kernel_of<&convert_kernel<In, Out, false, kQuantization, kTriton>>();
}

template <typename In, bool kGroup, bool kTriton>
Kernel &by_rows(bool vectors) {
  return vectors ? kernel_of<&quantise_row_kernel<In, true, kGroup, kTriton>>()
                 : kernel_of<&quantise_row_kernel<In, false, kGroup, kTriton>>();
}

// Groups of 128 columns are independent of each other: of few tokens, more blocks than tokens are to share them.
bool goes_by_rows(const Problem &p) {
  const int64_t few = 2 * cuda::facts(p.call->device.device_id).sm_count;
  return p.quantization == quantize::kToken || (p.quantization == quantize::kGroup && p.tokens > few);
}

template <typename In, typename Out, bool kTriton>
Kernel &for_quantization(const Problem &p, bool vectors) {
  if constexpr (std::is_same_v<Out, Float8>) {
    if (p.quantization == quantize::kToken) return by_rows<In, false, kTriton>(vectors);
    if (goes_by_rows(p)) return by_rows<In, true, kTriton>(vectors);
    if (p.quantization == quantize::kGroup) return by_columns<In, Out, quantize::kGroup, kTriton>(vectors);
  }
  return by_columns<In, Out, quantize::kStatic, kTriton>(vectors);
}

template <typename In, bool kTriton>
Kernel &for_output(const Problem &p, bool vectors) {
  if (p.output_dtype == EPMOE_FLOAT8_E4M3FN) return for_quantization<In, Float8, kTriton>(p, vectors);
  return for_quantization<In, In, kTriton>(p, vectors);
}

template <typename In>
Kernel &for_numerics(const Problem &p, bool vectors) {
  return p.numerics == kTriton ? for_output<In, true>(p, vectors) : for_output<In, false>(p, vectors);
}

Kernel &choose(const Problem &p, bool vectors) {
  switch (p.input_dtype) {
    case EPMOE_FLOAT32:
      return for_numerics<float>(p, vectors);
    case EPMOE_FLOAT16:
      return for_numerics<__half>(p, vectors);
    default:
      return for_numerics<__nv_bfloat16>(p, vectors);
  }
}

bool divides(int64_t bytes, const Problem &p, int64_t row_bytes) {
  const auto bits = reinterpret_cast<uintptr_t>(p.input) | reinterpret_cast<uintptr_t>(p.output);
  return (bits | static_cast<uintptr_t>(row_bytes)) % static_cast<uintptr_t>(bytes) == 0;
}

unsigned rows_of_grid(int64_t tokens) { return static_cast<unsigned>(std::min<int64_t>(tokens, 65535)); }

dim3 grid_of(int64_t tokens, int64_t columns, int threads) {
  return {static_cast<unsigned>((columns + threads - 1) / threads), rows_of_grid(tokens)};
}

// Then rows displace each other in L2 anyway.
bool exceeds_l2(const Problem &p) {
  const int64_t bytes = p.tokens * p.hidden * (itemsize(p.input_dtype) + p.topk * itemsize(p.output_dtype));
  return bytes > cuda::facts(p.call->device.device_id).l2_bytes;
}

constexpr int64_t kMostPart = 16384;  // bytes of a row in shared memory: a dozen blocks share an SM's

void launch_copy(const Problem &p, const Arguments &a) {
  const int64_t row_bytes = p.hidden * itemsize(p.input_dtype);
  if (gpu::bulk::available(p.call->device.device_id) && a.streams && divides(16, p, row_bytes)) {
    const int64_t parts = (row_bytes + kMostPart - 1) / kMostPart;
    const int64_t part = (row_bytes / parts + 15) / 16 * 16;
    const int64_t blocks = (row_bytes + part - 1) / part;
    kernel_of<&bulk_copy_kernel>().launch(*p.call, dim3(static_cast<unsigned>(blocks), rows_of_grid(p.tokens)),
                                          dim3(32), static_cast<size_t>(part), a, static_cast<uint32_t>(row_bytes),
                                          static_cast<uint32_t>(part));
    return;
  }
  const auto launch = [&](Kernel &kernel, int64_t unit) {
    const int64_t width = row_bytes / unit;
    const int threads = gpu::threads_for(width);
    kernel.launch(*p.call, grid_of(p.tokens, width, threads), dim3(static_cast<unsigned>(threads)), 0, a,
                  static_cast<uint32_t>(width));
  };
  if (divides(16, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint4>>(), 16);
  if (divides(4, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint32_t>>(), 4);
  if (divides(2, p, row_bytes)) return launch(kernel_of<&copy_kernel<uint16_t>>(), 2);
  launch(kernel_of<&copy_kernel<uint8_t>>(), 1);
}

void launch_conversion(const Problem &p, const Arguments &a) {
  const int64_t octets = (p.hidden + kOctet - 1) / kOctet;
  Kernel &kernel = choose(p, p.hidden % kOctet == 0 && divides(16, p, 0));
  if (goes_by_rows(p)) {
    const int64_t needed = (octets + kRowOctets - 1) / kRowOctets;
    const auto threads = static_cast<unsigned>(std::min<int64_t>(kRowThreads, (needed + 31) / 32 * 32));
    return kernel.launch(*p.call, dim3(static_cast<unsigned>(p.tokens)), dim3(threads), 0, a);
  }
  const int threads = gpu::threads_for(octets);
  kernel.launch(*p.call, grid_of(p.tokens, octets, threads), dim3(static_cast<unsigned>(threads)), 0, a);
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
  a.streams = exceeds_l2(p);
  if (p.copies()) return launch_copy(p, a);
  launch_conversion(p, a);
}

}  // namespace epmoe::scatter_rows
