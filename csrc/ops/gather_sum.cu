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
  uint32_t last_round;  // how many tokens are in the last of the rounds
  int32_t rounds;
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

// kNoRow for a remote slot, and for one that there is not.
template <typename T>
__device__ __forceinline__ Slot resolve_slot(const Arguments &a, uint32_t token, uint32_t k) {
  if (token >= a.tokens || k >= a.topk) return {kNoRow, 0.0f};
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
  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < N; ++i) lane[i] = __fmul_rn(lane[i], factor);
  }
  // The addends are absent where null.
  __device__ Vector<T, N> result(const T *shared, const T *residual) {
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
  __device__ void scale(float) {}  // folded into the weights
  __device__ Vector<T, N> result(const T *shared, const T *residual) {
    const T one = Element<T>::narrow(1.0f);
    if (shared != nullptr) sum.add_rounded(gpu::load<CachePolicy::kCached, T, N>(shared), one);
    if (residual != nullptr) sum.add_rounded(gpu::load<CachePolicy::kCached, T, N>(residual), one);
    return sum;
  }
};

constexpr int kMinBlocks = 8;  // an SM full of warps at 64 registers a thread, which the accumulators just fit

constexpr unsigned kWarp = 0xffffffffu;

// One thread's column group of the tokens that its block has, one after the other. kPlain: nothing but sums, without a
// factor and with nothing to add.
template <typename T, int N, Numerics kNumerics, CachePolicy kPolicy, bool kPlain>
struct Columns {
  using Row = Vector<T, N>;
  using Sum = Accumulator<T, N, kNumerics>;
  const Arguments &a;
  const T *rows;  // at the thread's column
  uint64_t at;    // of the output, in elements
  bool inside;

  __device__ explicit Columns(const Arguments &arguments) : a(arguments) {
    const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    inside = column < a.hidden;
    // Threads beyond the row read its beginning: cheaper than asking before every load.
    rows = static_cast<const T *>(a.rows) + (inside ? column : 0);
    at = uint64_t{blockIdx.y} * a.hidden + column;
  }
  // The row of a lane's slot, and its share of a sum. All lanes of the warp ask for the same.
  __device__ Row load(Slot mine, int lane) const {
    return gpu::load<kPolicy, T, N>(rows + uint64_t{__shfl_sync(kWarp, mine.row, lane)} * a.hidden);
  }
  __device__ void add(Sum &sum, const Row &row, Slot mine, int lane) const {
    sum.add(row, __shfl_sync(kWarp, mine.weight, lane), kPlain ? 1.0f : a.factor);
  }
  // The sum of one token is complete: the next one's is to follow.
  __device__ void finish(Sum sum) {
    if (inside) {
      const T *shared = nullptr;
      const T *residual = nullptr;
      if constexpr (!kPlain) {
        sum.scale(a.factor);
        if (a.shared_output != nullptr) shared = static_cast<const T *>(a.shared_output) + at;
        if (a.residual != nullptr) residual = static_cast<const T *>(a.residual) + at;
      }
      gpu::store<kPolicy, T, N>(static_cast<T *>(a.output) + at, sum.result(shared, residual));
    }
    at += uint64_t{gridDim.y} * a.hidden;
  }
};

// Sums kTokens tokens with all their kSlots slots local, the first of which lane `base` has: nothing is branched on,
// and all loads are in flight before the first fma.
template <int kSlots, int kTokens, typename Columns>
__device__ __forceinline__ void sum_all(Columns &columns, Slot mine, int base) {
  typename Columns::Row rows[kTokens * kSlots];
#pragma unroll
  for (int i = 0; i < kTokens * kSlots; ++i) rows[i] = columns.load(mine, base + i);
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    typename Columns::Sum sum;
#pragma unroll
    for (int i = t * kSlots; i < (t + 1) * kSlots; ++i) columns.add(sum, rows[i], mine, base + i);
    columns.finish(sum);
  }
}

// Adds the rows of one token: of the kSlots lanes from `base` on those in `locals`. A skipped slot is a branch, never a
// product with 0: its row is memory that nobody has written.
template <int kSlots, typename Columns>
__device__ __forceinline__ void add_some(const Columns &columns, typename Columns::Sum &sum, Slot mine, unsigned locals,
                                         int base) {
  typename Columns::Row rows[kSlots] = {};  // or what a skipped one keeps takes registers all over the kernel
  const unsigned its = locals >> base;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if ((its >> k & 1) != 0) rows[k] = columns.load(mine, base + k);
  }
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
    if ((its >> k & 1) != 0) columns.add(sum, rows[k], mine, base + k);
  }
}

constexpr int kTokens = 4;  // whose slots a warp resolves at once

__device__ __forceinline__ int lowest(unsigned lanes) { return __ffs(static_cast<int>(lanes)) - 1; }

// Sums `here` tokens that have a row or two each, as most experts are remote: at most eight rows, all under way
// together, four at a time. Of what is beyond the last one the last is loaded again, which costs less than branches
// that the compiler would wait behind.
template <int kSlots, typename Columns>
__device__ __forceinline__ void sum_sparse(Columns &columns, Slot mine, unsigned locals, int here) {
  typename Columns::Row rows[2 * kTokens] = {};
  unsigned left = locals;
  const auto load_four = [&](int first) {
#pragma unroll
    for (int i = first; i < first + kTokens; ++i) {
      rows[i] = columns.load(mine, lowest(left));
      const unsigned others = left & (left - 1);
      left = others != 0 ? others : left;
    }
  };
  load_four(0);
  const int count = __popc(locals);
  if (count > kTokens) load_four(kTokens);
  left = locals;
  typename Columns::Sum sum;
  int token = 0;
#pragma unroll
  for (int i = 0; i < 2 * kTokens; ++i) {
    if (i >= count) break;
    const int lane = lowest(left);
    for (; token < lane / kSlots; ++token) {
      columns.finish(sum);
      sum = {};
    }
    columns.add(sum, rows[i], mine, lane);
    left &= left - 1;
  }
  for (; token < here; ++token) {
    columns.finish(sum);
    sum = {};
  }
}

// How many tokens a block has: its own of every round, the last of which may be short.
__device__ __forceinline__ int turns_of(const Arguments &a) { return a.rounds - (blockIdx.y >= a.last_round ? 1 : 0); }

// Grid: x covers the column groups of a row, y as many tokens as run at once; blocks stride over the others. Lane l
// resolves slot l % kSlots of the token l / kSlots turns ahead.
template <typename T, int N, int kSlots, Numerics kNumerics, CachePolicy kPolicy, bool kPlain>
__global__ void __launch_bounds__(gpu::kMaxThreads, kMinBlocks) kernel(const Arguments a) {
  constexpr int kAtOnce = kSlots == 8 ? 1 : kSlots == 4 ? 2 : 4;
  const uint32_t lane = threadIdx.x % 32;
  const int turns = turns_of(a);
  Columns<T, N, kNumerics, kPolicy, kPlain> columns(a);
  gpu::wait_for_earlier_work();
  for (int turn = 0; turn < turns; turn += kTokens) {
    Slot mine{kNoRow, 0.0f};
    if (lane < kTokens * kSlots) {
      mine = resolve_slot<T>(a, blockIdx.y + (turn + lane / kSlots) * gridDim.y, lane % kSlots);
    }
    const unsigned locals = __ballot_sync(kWarp, mine.row != kNoRow);
    const int here = min(kTokens, turns - turn);
    const int count = __popc(locals);
    if (count == here * kSlots && here % kAtOnce == 0) {  // as usual
#pragma unroll 1
      for (int i = 0; i < here; i += kAtOnce) sum_all<kSlots, kAtOnce>(columns, mine, i * kSlots);
    } else if (count != 0 && count <= 2 * here) {
      sum_sparse<kSlots>(columns, mine, locals, here);
    } else {
#pragma unroll 1
      for (int i = 0; i < here; ++i) {
        typename decltype(columns)::Sum sum;
        add_some<kSlots>(columns, sum, mine, locals, i * kSlots);
        columns.finish(sum);
      }
    }
  }
}

// Of more than eight slots: 32 of one token at a time.
template <typename T, int N, Numerics kNumerics, CachePolicy kPolicy, bool kPlain>
__global__ void __launch_bounds__(gpu::kMaxThreads, kMinBlocks) many_kernel(const Arguments a) {
  constexpr int kTogether = 8;
  const uint32_t lane = threadIdx.x % 32;
  const int turns = turns_of(a);
  Columns<T, N, kNumerics, kPolicy, kPlain> columns(a);
  gpu::wait_for_earlier_work();
  for (int turn = 0; turn < turns; ++turn) {
    typename decltype(columns)::Sum sum;
    for (uint32_t first = 0; first < a.topk; first += 32) {
      const Slot mine = resolve_slot<T>(a, blockIdx.y + turn * gridDim.y, first + lane);
      const unsigned locals = __ballot_sync(kWarp, mine.row != kNoRow);
#pragma unroll 1
      for (int base = 0; base < 32 && locals >> base != 0; base += kTogether) {
        add_some<kTogether>(columns, sum, mine, locals, base);
      }
    }
    columns.finish(sum);
  }
}

using gpu::Kernel;
using gpu::kernel_of;

template <typename T, int N, Numerics kNumerics, CachePolicy kPolicy, bool kPlain>
Kernel &for_slots(int64_t topk) {
  if (topk == 1) return kernel_of<&kernel<T, N, 1, kNumerics, kPolicy, kPlain>>();
  if (topk == 2) return kernel_of<&kernel<T, N, 2, kNumerics, kPolicy, kPlain>>();
  if (topk <= 4) return kernel_of<&kernel<T, N, 4, kNumerics, kPolicy, kPlain>>();
  if (topk <= 8) return kernel_of<&kernel<T, N, 8, kNumerics, kPolicy, kPlain>>();
  return kernel_of<&many_kernel<T, N, kNumerics, kPolicy, kPlain>>();
}

// What is rare, columns one by one and sums with something added, has fewer kernels.
template <typename T, Numerics kNumerics>
Kernel &choose(int64_t topk, bool vectors, bool streaming, bool plain) {
  constexpr int kLanes = 16 / sizeof(T);
  if (!vectors) return for_slots<T, 1, kNumerics, CachePolicy::kCached, false>(topk);
  if (!plain) return for_slots<T, kLanes, kNumerics, CachePolicy::kCached, false>(topk);
  return streaming ? for_slots<T, kLanes, kNumerics, CachePolicy::kStreaming, true>(topk)
                   : for_slots<T, kLanes, kNumerics, CachePolicy::kCached, true>(topk);
}

template <typename T>
Kernel &choose(const Problem &p, bool vectors, bool streaming) {
  const bool plain = p.factor == 1.0f && p.shared_output == nullptr && p.residual == nullptr;
  return p.numerics == kTriton ? choose<T, kTriton>(p.topk, vectors, streaming, plain)
                               : choose<T, kFp32>(p.topk, vectors, streaming, plain);
}

Kernel &choose(const Problem &p, bool vectors, bool streaming) {
  switch (p.dtype) {
    case EPMOE_FLOAT32:
      return choose<float>(p, vectors, streaming);
    case EPMOE_FLOAT16:
      return choose<__half>(p, vectors, streaming);
    default:
      return choose<__nv_bfloat16>(p, vectors, streaming);
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
  // Few tokens: one wave of blocks, each going through several; where there is less than half of that to do, smaller
  // blocks share the GPU more evenly. Many: as many as a block resolves at once, for tokens differ in their rows, and
  // whoever is through early takes the next.
  const int64_t wave_threads = int64_t{facts.sm_count} * kMinBlocks * gpu::kMaxThreads;
  const int threads = p.tokens * groups <= wave_threads / 2 ? 64 : gpu::threads_for(groups);
  const int64_t chunks = (groups + threads - 1) / threads;
  const int64_t wave = std::max<int64_t>(1, wave_threads / threads / chunks);
  // What exceeds L2 by little displaces nothing when it streams; of what exceeds it by far, nothing would be left.
  const int64_t bytes = p.tokens * (p.topk + 1) * p.hidden * item;
  const bool streaming = bytes > facts.l2_bytes && bytes <= 4 * facts.l2_bytes;
  gpu::Kernel &kernel = choose(p, vectors, streaming);
  const int64_t most = std::max<int64_t>(1, INT32_MAX / p.topk);
  for (int64_t first = 0; first < p.tokens; first += most) {
    const int64_t tokens = std::min(most, p.tokens - first);
    const int64_t rows = std::max(wave, (tokens + kTokens - 1) / kTokens);
    const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(std::min({tokens, rows, int64_t{65535}})));
    Arguments a = arguments_of(p, first, tokens);
    a.rounds = static_cast<int32_t>((tokens + grid.y - 1) / grid.y);
    a.last_round = static_cast<uint32_t>(tokens - int64_t{a.rounds - 1} * grid.y);
    kernel.launch(*p.call, grid, dim3(static_cast<unsigned>(threads)), 0, a);
  }
}

}  // namespace epmoe::gather_sum
