// The order of up to 32,768 slots: a kernel for when what takes the time is latency.
#pragma once

#include <algorithm>

#include "ops/expert_order.cuh"

namespace epmoe::expert_order {
namespace {

constexpr int kFewRuns = 8;        // of a block of few_kernel; with 16, the code is longer and every size slower
constexpr int kCountedAtOnce = 4;  // of all slots, by a thread; with 8, up to 4,096 slots are slower

// Few slots, packed: each lane keeps kPer of a run's slots in registers, and a run has kPer words of marks a bucket, so
// that nothing waits for the slots before it. Straight-line code: with so little to do, fetching it counts. Several
// blocks do not wait for each other, which takes longer than counting: each counts all slots for itself.
template <int kPer, bool kAlone>
__global__ void __launch_bounds__(kMostThreads, 1) few_kernel(const Arguments a) {
  extern __shared__ __align__(16) int32_t memory[];
  __shared__ int32_t total_of[kMostThreads / 32];
  __shared__ int32_t negatives;
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int buckets = a.experts + 1;
  const int b = threadIdx.x;                                 // the bucket whose sums this thread does
  auto *marks = reinterpret_cast<uint32_t *>(memory);        // [runs][buckets][kPer]
  int32_t *earlier_runs = memory + a.runs * buckets * kPer;  // [runs][buckets]
  int32_t *first_row = earlier_runs + a.runs * buckets;      // [buckets]
  // [buckets]: of all slots in the lower half, of those of earlier blocks in the upper
  auto *seen = reinterpret_cast<uint32_t *>(first_row + buckets);
#pragma unroll 1
  for (int i = threadIdx.x; 4 * i < a.runs * buckets * kPer; i += threads()) {
    reinterpret_cast<int4 *>(memory)[i] = make_int4(0, 0, 0, 0);  // reaches into earlier_runs at most
  }
  if (!kAlone && b < buckets) seen[b] = 0;
  gpu::let_the_next_come();
  gpu::wait_for_earlier_work();

  const int own = static_cast<int>(blockIdx.x) * a.runs * 32 * kPer;
  const int begin = warp < a.runs ? own + warp * 32 * kPer : a.slots;
  gpu::RawIndex raw[kPer];
  int bucket[kPer];
  int rank[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) raw[i] = load_id(a, begin + 32 * i + lane, a.slots);
  gpu::RawIndex any[kCountedAtOnce];
  const auto load_any = [&](int first) {
#pragma unroll
    for (int i = 0; i < kCountedAtOnce; ++i) any[i] = load_id(a, first + i * threads(), a.slots);
  };
  if constexpr (!kAlone) load_any(threadIdx.x);
  __syncthreads();
  uint32_t *own_marks = marks + warp * buckets * kPer;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    bucket[i] = bucket_of<true>(a, raw[i], begin + 32 * i + lane, a.slots);
    if (bucket[i] >= 0) atomicOr(own_marks + bucket[i] * kPer + i, 1u << lane);
  }
  if constexpr (!kAlone) {
#pragma unroll 1
    for (int first = threadIdx.x;;) {
#pragma unroll
      for (int i = 0; i < kCountedAtOnce; ++i) {
        const int slot = first + i * threads();
        const int its = bucket_of<false>(a, any[i], slot, a.slots);
        if (its >= 0) atomicAdd(seen + its, slot < own ? 0x10001u : 1u);
      }
      first += kCountedAtOnce * threads();
      if (first >= a.slots) break;
      load_any(first);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    rank[i] = 0;
    if (bucket[i] < 0) continue;
#pragma unroll
    for (int j = 0; j <= i; ++j) {
      const uint32_t word = own_marks[bucket[i] * kPer + j];
      rank[i] += __popc(j < i ? word : word & ((1u << lane) - 1));
    }
  }
  __syncthreads();

  int32_t count = 0;
  int32_t earlier = 0;  // of this bucket in earlier blocks
  if (b < buckets) {
#pragma unroll
    for (int run = 0; run < kFewRuns; ++run) {
      if (run >= a.runs) break;
      earlier_runs[run * buckets + b] = count;
#pragma unroll
      for (int i = 0; i < kPer; ++i) count += __popc(marks[(run * buckets + b) * kPer + i]);
    }
  }
  if (!kAlone && b < buckets) {
    earlier = static_cast<int32_t>(seen[b] >> 16);
    count = static_cast<int32_t>(seen[b] & 0xffffu);
  }

  const int32_t sum = warp_scan(count);
  if (lane == 31) total_of[warp] = sum;
  if (b == 0) negatives = count;
  __syncthreads();
  const int32_t before = __reduce_add_sync(kWarp, lane < warp ? total_of[lane] : 0) + sum - count;
  const int32_t dropped = a.drop_negatives ? negatives : 0;
  if (b < buckets) {
    first_row[b] = before + earlier - dropped;
    if (blockIdx.x == 0) {
      if (a.seg_indptr != nullptr) a.seg_indptr[b] = b == 0 ? 0 : before + count - dropped;
      if (a.masked_m != nullptr && b > 0) a.masked_m[b - 1] = count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    if (bucket[i] < 0) continue;
    const int32_t row = first_row[bucket[i]] + earlier_runs[warp * buckets + bucket[i]] + rank[i];
    store_index(a.src2dst, a.src2dst_int64, begin + 32 * i + lane, row);
    if (a.reorder_topk_ids != nullptr) {
      store_index(a.reorder_topk_ids, a.ids_int64, row < 0 ? row + a.slots : row, bucket[i] - 1);
    }
  }
}

// Whether it did: there may be too many slots or experts for it.
template <int kPer, bool kAlone>
bool launch_few(const Problem &p, Arguments a, int most_slots) {
  const int buckets = a.experts + 1;
  const int blocks = kAlone ? 1 : divide_up(p.slots, 32 * kPer * kFewRuns);
  a.runs = std::max(1, divide_up(p.slots, 32 * kPer * blocks));
  const int counting = kAlone ? 0 : divide_up(p.slots, 32 * kCountedAtOnce);
  const int threads = 32 * std::max({a.runs, divide_up(buckets, 32), std::min(counting, kMostThreads / 32)});
  const size_t shared = size_t{4} * static_cast<size_t>(buckets) * static_cast<size_t>(a.runs * (kPer + 1) + 2);
  if (p.slots > most_slots || threads > kMostThreads || shared > gpu::kMostShared) return false;
  gpu::kernel_of<&few_kernel<kPer, kAlone>>().launch(*p.call, dim3(static_cast<unsigned>(blocks)),
                                                     dim3(static_cast<unsigned>(threads)), shared, a);
  return true;
}

constexpr int kMostFew = 32768;  // half a word counts to 65,535

bool run_few(const Problem &p, const Arguments &a) {
  if (p.reserved != nullptr || p.m_max > 0 || p.m_indices != nullptr) return false;
  return launch_few<1, true>(p, a, 32 * kFewRuns) || launch_few<2, true>(p, a, 64 * kFewRuns) ||
         launch_few<1, false>(p, a, kMostFew);
}

}  // namespace
}  // namespace epmoe::expert_order
