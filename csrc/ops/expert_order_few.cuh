// The order of up to 8,192 slots, which decoding has: a kernel for when what takes the time is latency.
#pragma once

#include <cooperative_groups.h>

#include <algorithm>

#include "ops/expert_order.cuh"

namespace epmoe::expert_order {
namespace {

constexpr int kFewRuns = 8;  // of a block of few_kernel; with 16, the code is longer and every size slower

// Few slots, packed: each lane keeps kPer of a run's slots in registers, and a run has kPer words of marks a bucket, so
// that nothing waits for the slots before it. Straight-line code: with so little to do, fetching it counts.
template <int kPer, bool kClustered>
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
  int32_t *block_count = earlier_runs + a.runs * buckets;    // [buckets]
  int32_t *first_row = block_count + buckets;                // [buckets]
#pragma unroll 1
  for (int i = threadIdx.x; 4 * i < a.runs * buckets * kPer; i += threads()) {
    reinterpret_cast<int4 *>(memory)[i] = make_int4(0, 0, 0, 0);  // reaches into earlier_runs at most
  }
  gpu::let_the_next_come();
  gpu::wait_for_earlier_work();

  const int begin = warp < a.runs ? static_cast<int>(blockIdx.x * a.runs + warp) * 32 * kPer : a.slots;
  gpu::RawIndex raw[kPer];
  int bucket[kPer];
  int rank[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) raw[i] = load_id(a, begin + 32 * i + lane, a.slots);
  __syncthreads();
  uint32_t *own_marks = marks + warp * buckets * kPer;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    bucket[i] = bucket_of<true>(a, raw[i], begin + 32 * i + lane, a.slots);
    if (bucket[i] >= 0) atomicOr(own_marks + bucket[i] * kPer + i, 1u << lane);
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
    block_count[b] = count;
  }
  if constexpr (kClustered) {
#if __CUDA_ARCH__ >= 900
    auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    if (b < buckets) {
      int32_t counts[kClusterBlocks];
#pragma unroll
      for (unsigned block = 0; block < kClusterBlocks; ++block) {
        counts[block] = *cluster.map_shared_rank(block_count + b, block);
      }
      count = 0;
#pragma unroll
      for (unsigned block = 0; block < kClusterBlocks; ++block) {
        if (block == blockIdx.x) earlier = count;
        count += counts[block];
      }
    }
    cluster.barrier_arrive();  // a block's memory has to last until the others have read it
#endif
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
#if __CUDA_ARCH__ >= 900
  if constexpr (kClustered) cooperative_groups::this_cluster().barrier_wait();
#endif
}

// Whether it did: there may be too many slots or experts for it.
template <int kPer, bool kClustered>
bool launch_few(const Problem &p, Arguments a) {
  const int blocks = kClustered ? kClusterBlocks : 1;
  const int buckets = a.experts + 1;
  a.runs = std::max(1, divide_up(p.slots, 32 * kPer * blocks));
  const int threads = 32 * std::max(a.runs, divide_up(buckets, 32));
  const size_t shared = size_t{4} * static_cast<size_t>(buckets) * static_cast<size_t>(a.runs * (kPer + 1) + 2);
  if (a.runs > kFewRuns || threads > kMostThreads || shared > gpu::kMostShared) return false;
  auto &kernel = gpu::kernel_of<&few_kernel<kPer, kClustered>>();
  const auto block = dim3(static_cast<unsigned>(threads));
  if constexpr (kClustered)
    kernel.launch_cluster(*p.call, kClusterBlocks, block, shared, a);
  else
    kernel.launch(*p.call, dim3(1), block, shared, a);
  return true;
}

bool run_few(const Problem &p, const Arguments &a, bool clusters) {
  if (p.reserved != nullptr || p.m_max > 0 || p.m_indices != nullptr) return false;
  if (p.slots <= 256 && launch_few<1, false>(p, a)) return true;
  if (p.slots <= 512 && launch_few<2, false>(p, a)) return true;
  if (clusters && p.slots <= 4096 && launch_few<2, true>(p, a)) return true;
  return clusters && p.slots <= 8192 && launch_few<4, true>(p, a);
}

}  // namespace
}  // namespace epmoe::expert_order
