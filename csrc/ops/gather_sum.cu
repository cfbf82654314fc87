// The weighted sum of rows on CUDA. One thread sums one 16-byte column group of one token over all its slots; a warp's
// lanes resolve the slots of several tokens together (one slot each) and hand rows and weights around by shuffles, so
// that all row loads of a token are in flight before the first fma.
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
  int64_t first_token;  // of this launch; pointers are at it, and slots are counted from it
  uint32_t tokens, hidden, topk;
  int64_t start_expert_id, end_expert_id, dst_start;
  uint32_t row_count;
  float factor;
  int32_t op_index, src2dst_param;
  bool src2dst_int64, topk_ids_int64, weights_float32;
};

struct Slot {
  uint32_t row;
  float weight;
};

template <typename T>
__device__ __forceinline__ Slot resolve_slot(const Arguments &a, uint32_t token, uint32_t k) {
  const uint32_t flat = token * a.topk + k;
  const gpu::RawIndex raw_row = gpu::load_raw(a.src2dst, a.src2dst_int64, flat);
  const gpu::RawIndex raw_id = gpu::load_raw(a.topk_ids, a.topk_ids_int64, flat);
  float wide = 1.0f;
  T narrow{};
  if (a.weights != nullptr && a.weights_float32) wide = __ldg(static_cast<const float *>(a.weights) + flat);
  if (a.weights != nullptr && !a.weights_float32) narrow = static_cast<const T *>(a.weights)[flat];

  const int64_t destination =
      a.src2dst != nullptr ? gpu::index_of(raw_row, a.src2dst_int64) : a.first_token * a.topk + flat;
  const int64_t id = gpu::index_of(raw_id, a.topk_ids_int64);
  const bool local = a.topk_ids != nullptr ? id >= a.start_expert_id && id <= a.end_expert_id : destination >= 0;
  if (!local) return {kNoRow, 0.0f};
  const uint64_t row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(a.dst_start);
  if (row >= a.row_count) {
    gpu::report_index(a.status, a.op_index, a.src2dst_param, a.first_token + token, k, destination, a.dst_start,
                      a.dst_start + a.row_count);
    return {kNoRow, 0.0f};
  }
  const bool widened = a.weights == nullptr || a.weights_float32;
  return {static_cast<uint32_t>(row), widened ? wide : Element<T>::widen(narrow)};
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
constexpr unsigned kAllSlots = (1u << kSlots) - 1;

// A block's tokens, kSlots slots at a time, are its steps. A warp resolves as many steps at once as its lanes have
// slots for: lane l has slot l % kSlots of step `step` + l / kSlots.
template <typename T, int kSlots>
__device__ __forceinline__ Slot resolve_steps(const Arguments &a, uint32_t step) {
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t mine = step + lane / kSlots;
  const uint32_t steps_each = (a.topk + kSlots - 1) / kSlots;
  const uint32_t turn = steps_each == 1 ? mine : mine / steps_each;
  const uint32_t k = (mine - turn * steps_each) * kSlots + lane % kSlots;
  const uint64_t token = blockIdx.y + static_cast<uint64_t>(turn) * gridDim.y;
  if (k >= a.topk || token >= a.tokens) return {kNoRow, 0.0f};
  return resolve_slot<T>(a, static_cast<uint32_t>(token), k);
}

// What a warp has under way: the sum of one token's column group, and which token that is.
template <typename T, int N, Numerics kNumerics, CachePolicy kPolicy>
struct Sum {
  const Arguments &a;
  const uint32_t column;
  const bool inside;
  uint64_t token;
  Accumulator<T, N, kNumerics> sum = {};

  __device__ Vector<T, N> load(uint32_t row) const {
    Vector<T, N> data;
    if (inside) data = gpu::load<kPolicy, T, N>(static_cast<const T *>(a.rows) + column + uint64_t{row} * a.hidden);
    return data;
  }
  __device__ void finish() {
    if (inside) {
      const uint64_t at = token * a.hidden + column;
      const T *shared = a.shared_output == nullptr ? nullptr : static_cast<const T *>(a.shared_output) + at;
      const T *residual = a.residual == nullptr ? nullptr : static_cast<const T *>(a.residual) + at;
      gpu::store<kPolicy, T, N>(static_cast<T *>(a.output) + at, sum.result(a.factor, shared, residual));
    }
    sum = {};
    token += gridDim.y;
  }
};

// Adds the rows of a step whose slots are all local, the first of which lane `base` holds.
template <int kSlots, typename Sum>
__device__ __forceinline__ void add_all(Sum &sum, Slot mine, uint32_t base) {
  decltype(sum.load(0)) data[kSlots];
#pragma unroll
  for (int k = 0; k < kSlots; ++k) data[k] = sum.load(__shfl_sync(0xffffffffu, mine.row, base + k));
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    sum.sum.add(data[k], __shfl_sync(0xffffffffu, mine.weight, base + k), sum.a.factor);
  }
}

// Adds the rows of the lanes in `locals`, of several steps: where most experts are remote a token has few rows, and
// those of the tokens behind it have to be under way with them. A skipped slot is a branch, never a product with 0: its
// row is memory that nobody has written. `step` is the step of lane 0.
template <int kSlots, typename Sum>
__device__ __forceinline__ void add_some(Sum &sum, Slot mine, unsigned locals, uint32_t step, uint32_t steps_each) {
  constexpr int kTogether = kSlots == 8 ? 8 : 4;
  while (locals != 0) {
    decltype(sum.load(0)) data[kTogether];
    unsigned left = locals;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (left == 0) break;
      data[i] = sum.load(__shfl_sync(0xffffffffu, mine.row, __ffs(static_cast<int>(left)) - 1));
      left &= left - 1;
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (locals == 0) break;
      const uint32_t lane = __ffs(static_cast<int>(locals)) - 1;
      locals &= locals - 1;
      const uint32_t its = step + lane / kSlots;
      const uint64_t token = blockIdx.y + static_cast<uint64_t>(steps_each == 1 ? its : its / steps_each) * gridDim.y;
      while (sum.token != token) sum.finish();
      sum.sum.add(data[i], __shfl_sync(0xffffffffu, mine.weight, lane), sum.a.factor);
    }
  }
}

// Grid: x covers the column groups of a row, y as many tokens as run at once; blocks stride over the others.
template <typename T, int N, int kSlots, Numerics kNumerics, CachePolicy kPolicy>
__global__ void __launch_bounds__(gpu::kMaxThreads, kMinBlocks) kernel(const Arguments a) {
  gpu::wait_for_earlier_work();
  constexpr uint32_t kSteps = 32 / kSlots;
  const uint32_t steps_each = (a.topk + kSlots - 1) / kSlots;
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
  Sum<T, N, kNumerics, kPolicy> sum{a, column, column < a.hidden, blockIdx.y};
  const uint32_t steps = ((a.tokens - 1 - blockIdx.y) / gridDim.y + 1) * steps_each;
  for (uint32_t step = 0; step < steps; step += kSteps) {
    const Slot mine = resolve_steps<T, kSlots>(a, step);
    const unsigned locals = __ballot_sync(0xffffffffu, mine.row != kNoRow);
    const uint32_t here = min(kSteps, steps - step);
    // Usually every slot is local: then nothing is branched on, and all loads are in flight before the first fma.
    if (steps_each == 1 && locals == 0xffffffffu >> (32 - here * kSlots)) {
#pragma unroll 1
      for (uint32_t i = 0; i < here; ++i) {
        add_all<kSlots>(sum, mine, i * kSlots);
        sum.finish();
      }
    } else {
      add_some<kSlots>(sum, mine, locals, step, steps_each);
    }
    // Tokens that end here without a local slot behind them.
    const uint64_t next = blockIdx.y + static_cast<uint64_t>((step + here) / steps_each) * gridDim.y;
    while (sum.token < next) sum.finish();
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

// The part of a problem that begins at `first_token`, of so few tokens that 32 bits count their slots.
Arguments arguments_of(const Problem &p, int64_t first_token, int64_t tokens) {
  const auto from = [](const void *data, int64_t elements, int64_t item) -> const void * {
    return data == nullptr ? nullptr : static_cast<const char *>(data) + elements * item;
  };
  const int64_t item = itemsize(p.dtype);
  const int64_t slots = first_token * p.topk;
  const int64_t columns = first_token * p.hidden;
  Arguments a{};
  a.rows = p.rows;
  a.output = const_cast<void *>(from(p.output, columns, item));
  a.src2dst = from(p.src2dst.data, slots, p.src2dst.is_int64 ? 8 : 4);
  a.topk_ids = from(p.topk_ids.data, slots, p.topk_ids.is_int64 ? 8 : 4);
  a.weights = from(p.weights, slots, p.weights_float32 ? 4 : item);
  a.shared_output = from(p.shared_output, columns, item);
  a.residual = from(p.residual, columns, item);
  a.status = cuda::status_word(p.call->device.device_id);
  a.first_token = first_token;
  a.tokens = static_cast<uint32_t>(tokens);
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
  return a;
}

}  // namespace

void run_cuda(const Problem &p) {
  const cuda::Facts &facts = cuda::facts(p.call->device.device_id);
  const int64_t item = itemsize(p.dtype);
  const bool vectors = p.hidden * item % 16 == 0 && gpu::aligned16(p.rows) && gpu::aligned16(p.output) &&
                       gpu::aligned16(p.shared_output) && gpu::aligned16(p.residual);
  const int64_t groups = vectors ? p.hidden * item / 16 : p.hidden;
  // One wave of blocks, each going through several tokens; where there is less than half of that to do, smaller blocks
  // share the GPU more evenly.
  const int64_t wave_threads = int64_t{facts.sm_count} * kMinBlocks * gpu::kMaxThreads;
  const int threads = p.tokens * groups <= wave_threads / 2 ? 64 : gpu::threads_for(groups);
  const int64_t chunks = (groups + threads - 1) / threads;
  const int64_t wave = std::max<int64_t>(1, wave_threads / threads / chunks);
  // What exceeds L2 by little displaces nothing when it streams; of what exceeds it by far, nothing would be left.
  const int64_t bytes = p.tokens * (p.topk + 1) * p.hidden * item;
  const bool streaming = bytes > facts.l2_bytes && bytes <= 4 * facts.l2_bytes;
  gpu::Kernel &kernel = choose(p.dtype, p.topk, p.numerics, vectors, streaming);
  const int64_t most = std::max<int64_t>(1, INT32_MAX / p.topk);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const int64_t tokens = std::min(most, p.tokens - first);
    const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(std::min({tokens, wave, int64_t{65535}})));
    kernel.launch(*p.call, grid, dim3(static_cast<unsigned>(threads)), 0, arguments_of(p, first, tokens));
  }
}

}  // namespace epmoe::gather_sum
