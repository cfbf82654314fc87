// The weighted sum of rows on CUDA. One thread sums one 16-byte column group of one token over all its slots; a warp's
// lanes resolve the slots together (one slot each) and hand rows and weights around by shuffles, so that all row loads
// of a token are in flight before the first fma.
#include <algorithm>

#include "ops/common.cuh"
#include "ops/gather_sum.h"

namespace epmoe::gather_sum {
namespace {

using gpu::CachePolicy;
using gpu::Element;
using gpu::Vector;

struct Arguments {
  const void *rows;
  void *output;
  const void *src2dst;
  const void *topk_ids;
  const void *weights;
  const void *shared_output;
  const void *residual;
  cuda::StatusWord *status;
  int64_t tokens;
  uint32_t hidden, topk;
  int64_t start_expert_id, end_expert_id, dst_start;
  uint32_t row_count;
  float factor;
  int32_t op_index, src2dst_param;
  bool src2dst_int64, topk_ids_int64, weights_float32;
};

template <typename T>
__device__ float load_weight(const Arguments &a, int64_t flat) {
  if (a.weights == nullptr) return 1.0f;
  if (a.weights_float32) return __ldg(static_cast<const float *>(a.weights) + flat);
  return Element<T>::widen(static_cast<const T *>(a.weights)[flat]);
}

struct Slot {
  uint32_t row;
  float weight;
};

template <typename T>
__device__ Slot resolve_slot(const Arguments &a, int64_t token, uint32_t k) {
  const int64_t flat = token * a.topk + k;
  const int64_t destination = a.src2dst != nullptr ? gpu::load_index(a.src2dst, a.src2dst_int64, flat) : flat;
  const float weight = load_weight<T>(a, flat);
  bool local = destination >= 0;
  if (a.topk_ids != nullptr) {
    const int64_t id = gpu::load_index(a.topk_ids, a.topk_ids_int64, flat);
    local = id >= a.start_expert_id && id <= a.end_expert_id;
  }
  if (!local) return {kNoRow, 0.0f};
  const uint64_t row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(a.dst_start);
  if (row >= a.row_count) {
    gpu::report_index(a.status, a.op_index, a.src2dst_param, token, k, destination, a.dst_start,
                      a.dst_start + a.row_count);
    return {kNoRow, 0.0f};
  }
  return {static_cast<uint32_t>(row), weight};
}

// The running sum of one column group: float32, or the activation dtype with one rounding a slot as in the original.
template <typename T, int N, Numerics kNumerics>
struct Accumulator {
  float lane[N] = {};
  __device__ void add(const Vector<T, N> &row, float weight, float) {
    float x[N];
    row.widen(x);
#pragma unroll
    for (int i = 0; i < N; ++i) lane[i] = __fmaf_rn(x[i], weight, lane[i]);
  }
  // The addends are absent where null.
  __device__ Vector<T, N> result(float factor, const T *shared, const T *residual) {
#pragma unroll
    for (int i = 0; i < N; ++i) lane[i] = __fmul_rn(lane[i], factor);
    if (shared != nullptr) add(gpu::load<CachePolicy::kCached, T, N>(shared), 1.0f, 1.0f);
    if (residual != nullptr) add(gpu::load<CachePolicy::kCached, T, N>(residual), 1.0f, 1.0f);
    Vector<T, N> out;
    out.narrow(lane);
    return out;
  }
};

template <typename T, int N>
struct Accumulator<T, N, kTriton> {
  Vector<T, N> sum = {};
  __device__ void add(const Vector<T, N> &row, float weight, float factor) {
    T rounded = Element<T>::narrow(weight);
    if (factor != 1.0f) rounded = Element<T>::mul(rounded, Element<T>::narrow(factor));
    sum.add_rounded(row, rounded);
  }
  __device__ Vector<T, N> result(float, const T *shared, const T *residual) {
    const T one = Element<T>::narrow(1.0f);
    if (shared != nullptr) sum.add_rounded(gpu::load<CachePolicy::kCached, T, N>(shared), one);
    if (residual != nullptr) sum.add_rounded(gpu::load<CachePolicy::kCached, T, N>(residual), one);
    return sum;
  }
};

constexpr int kMinBlocks = 8;  // an SM full of warps at 64 registers a thread, which the accumulators just fit

template <int kSlots>
constexpr unsigned kAllSlots = kSlots == 32 ? 0xffffffffu : (1u << kSlots) - 1;

// Adds the rows of up to kSlots slots, one of which each of the warp's first lanes holds. A skipped slot is a branch,
// never a product with 0: its row is memory that nobody has written.
template <bool kAllLocal, int kSlots, CachePolicy kPolicy, typename T, int N, Numerics kNumerics>
__device__ __forceinline__ void add_slots(Accumulator<T, N, kNumerics> &sum, const T *rows, Slot mine, unsigned locals,
                                          bool inside, const Arguments &a) {
  Vector<T, N> data[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const uint32_t row = __shfl_sync(0xffffffffu, mine.row, k);
    if (inside && (kAllLocal || (locals >> k & 1u))) {
      data[k] = gpu::load<kPolicy, T, N>(rows + static_cast<uint64_t>(row) * a.hidden);
    }
  }
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    const float weight = __shfl_sync(0xffffffffu, mine.weight, k);
    if (kAllLocal || (locals >> k & 1u)) sum.add(data[k], weight, a.factor);
  }
}

// Grid: x covers the column groups of a row, y the tokens (and strides when there are more than y may count).
template <typename T, int N, int kSlots, Numerics kNumerics, CachePolicy kPolicy>
__global__ void __launch_bounds__(gpu::kMaxThreads, kMinBlocks) kernel(const Arguments a) {
  const unsigned lane = threadIdx.x % 32;
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  const bool inside = column < a.hidden;
  const T *rows = static_cast<const T *>(a.rows) + column;
  for (int64_t token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    Accumulator<T, N, kNumerics> sum;
#pragma unroll 1
    for (uint32_t first = 0; first < a.topk; first += kSlots) {
      Slot mine{kNoRow, 0.0f};
      if (lane < kSlots && first + lane < a.topk) mine = resolve_slot<T>(a, token, first + lane);
      // Usually every slot is local: then nothing is branched on, and all loads are in flight before the first fma.
      const unsigned locals = __ballot_sync(0xffffffffu, mine.row != kNoRow);
      if (locals == kAllSlots<kSlots>)
        add_slots<true, kSlots, kPolicy>(sum, rows, mine, locals, inside, a);
      else
        add_slots<false, kSlots, kPolicy>(sum, rows, mine, locals, inside, a);
    }
    if (inside) {
      const int64_t at = token * a.hidden + column;
      const T *shared = a.shared_output == nullptr ? nullptr : static_cast<const T *>(a.shared_output) + at;
      const T *residual = a.residual == nullptr ? nullptr : static_cast<const T *>(a.residual) + at;
      gpu::store<kPolicy, T, N>(static_cast<T *>(a.output) + at, sum.result(a.factor, shared, residual));
    }
  }
}

using gpu::Kernel;
using gpu::kernel_of;

template <typename T, int N, Numerics kNumerics, CachePolicy kPolicy>
Kernel &for_slots(int64_t topk) {
  if (topk == 1) return kernel_of<&kernel<T, N, 1, kNumerics, kPolicy>>();
  if (topk == 2) return kernel_of<&kernel<T, N, 2, kNumerics, kPolicy>>();
  if (topk <= 4) return kernel_of<&kernel<T, N, 4, kNumerics, kPolicy>>();
  return kernel_of<&kernel<T, N, 8, kNumerics, kPolicy>>();
}

template <typename T>
Kernel &choose(int64_t topk, Numerics numerics, bool vectors, bool streaming) {
  constexpr int kLanes = 16 / sizeof(T);
  // In float32 the original's arithmetic is the default's, unless a factor is folded into the weights.
  if (numerics == kTriton) {
    if (!vectors) return for_slots<T, 1, kTriton, CachePolicy::kCached>(topk);
    return streaming ? for_slots<T, kLanes, kTriton, CachePolicy::kStreaming>(topk)
                     : for_slots<T, kLanes, kTriton, CachePolicy::kCached>(topk);
  }
  if (!vectors) return for_slots<T, 1, kFp32, CachePolicy::kCached>(topk);
  return streaming ? for_slots<T, kLanes, kFp32, CachePolicy::kStreaming>(topk)
                   : for_slots<T, kLanes, kFp32, CachePolicy::kCached>(topk);
}

Kernel &choose(int32_t dtype, int64_t topk, Numerics numerics, bool vectors, bool streaming) {
  switch (dtype) {
    case EPMOE_FLOAT32:
      return choose<float>(topk, numerics, vectors, streaming);
    case EPMOE_FLOAT16:
      return choose<__half>(topk, numerics, vectors, streaming);
    default:
      return choose<__nv_bfloat16>(topk, numerics, vectors, streaming);
  }
}

}  // namespace

void run_cuda(const Problem &p) {
  const int32_t device = p.call->device.device_id;
  Arguments a{};
  a.rows = p.rows;
  a.output = p.output;
  a.src2dst = p.src2dst.data;
  a.topk_ids = p.topk_ids.data;
  a.weights = p.weights;
  a.shared_output = p.shared_output;
  a.residual = p.residual;
  a.status = cuda::status_word(device);
  a.tokens = p.tokens;
  a.hidden = static_cast<uint32_t>(p.hidden);
  a.topk = static_cast<uint32_t>(p.topk);
  a.start_expert_id = p.start_expert_id;
  a.end_expert_id = p.end_expert_id;
  a.dst_start = p.dst_start;
  a.row_count = static_cast<uint32_t>(p.row_count);
  a.factor = p.factor;
  a.op_index = p.call->entry->index;
  a.src2dst_param = p.src2dst_param;
  a.src2dst_int64 = p.src2dst.is_int64;
  a.topk_ids_int64 = p.topk_ids.is_int64;
  a.weights_float32 = p.weights_float32;

  const int64_t item = itemsize(p.dtype);
  const bool vectors = p.hidden * item % 16 == 0 && gpu::aligned16(a.rows) && gpu::aligned16(a.output) &&
                       gpu::aligned16(a.shared_output) && gpu::aligned16(a.residual);
  const int64_t groups = vectors ? p.hidden * item / 16 : p.hidden;
  const bool streaming = p.tokens * (p.topk + 1) * p.hidden * item > cuda::facts(device).l2_bytes;
  const int threads = gpu::threads_for(groups);
  const dim3 grid(static_cast<unsigned>((groups + threads - 1) / threads),
                  static_cast<unsigned>(std::min<int64_t>(p.tokens, 65535)));
  choose(p.dtype, p.topk, p.numerics, vectors, streaming)
      .launch(grid, dim3(static_cast<unsigned>(threads)), p.call->stream, 0, a);
}

}  // namespace epmoe::gather_sum
