// The order of slots by expert on CUDA. Each warp counts a run of slots in its own row of a table in shared memory, and
// keeps each slot's rank in the run; running sums over warps (and blocks) and over experts turn ranks into positions.
// Equal ids within a warp find each other by setting their lane's bit in a word of the id: order is kept, and it costs
// a fraction of match_any.
#include <cooperative_groups.h>

#include <algorithm>

#include "ops/expert_order_few.cuh"

namespace epmoe::expert_order {
namespace {

constexpr int kMaxRuns = 16;           // of a block, a warp each: more would take longer to add up than they save
constexpr int kRunSlots = 64;          // what a run has at least, as long as there are fewer than that
constexpr int kBlockSlots = 1024;      // what one block does before more pay for their synchronisation
constexpr int kClusterSlots = 65536;   // what they do before more blocks pay for a slower synchronisation
constexpr int kGridBlockSlots = 4096;  // a block's share when there are many
constexpr int kMostKept = 8192;        // slots of a block that shared memory keeps
constexpr int kMaxRanks = 1 << 20;     // beside a bucket in one word
constexpr int kScattered = 512;        // slots of a block whose ids are stored one by one, not a segment at a time

// What blocks that count together wait by.
enum Together { kAlone, kCluster, kGrid };

// Shared memory: marks[runs][buckets] and table[runs][buckets], five tables [buckets], and kept[slots of the block].
struct Shared {
  uint32_t *marks;
  int32_t *table;
  int32_t *count, *before;         // of all slots: how many a bucket has, and how many are in earlier ones
  int32_t *block_count, *earlier;  // of a bucket: how many in this block, and how many in earlier blocks
  int32_t *reserved_before;
  int32_t *kept;
};
constexpr int kTables = 5;

// Exclusive running sum of n values by the whole block; no sum is told as more than `most`.
template <typename Sum, typename Value>
__device__ __forceinline__ void exclusive_scan(int n, int32_t *out, int64_t most, const Value &value) {
  __shared__ Sum total_of[kMostThreads / 32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  Sum carry = 0;
#pragma unroll 1
  for (int first = 0; first < n; first += threads()) {
    const int i = first + threadIdx.x;
    const Sum own = i < n ? value(i) : 0;
    const Sum sum = warp_scan(own);
    if (lane == 31) total_of[warp] = sum;
    __syncthreads();
    const Sum totals = warp_scan(total_of[lane]);
    const Sum earlier = __shfl_sync(kWarp, totals, warp == 0 ? 0 : warp - 1);
    const Sum begin = carry + (warp == 0 ? 0 : earlier) + sum - own;
    if (i < n) out[i] = static_cast<int32_t>(min(most, static_cast<int64_t>(begin)));
    carry += __shfl_sync(kWarp, totals, warps() - 1);
    __syncthreads();
  }
}

// How many earlier slots of the run have this slot's bucket. All lanes of the warp call it; -1 counts nowhere.
__device__ __forceinline__ int rank_in_run(uint32_t *marks, int32_t *table, int bucket) {
  const unsigned lane = threadIdx.x % 32;
  if (bucket >= 0) atomicOr(marks + bucket, 1u << lane);
  __syncwarp();
  const uint32_t peers = bucket >= 0 ? marks[bucket] : 0;
  const int32_t before = bucket >= 0 ? table[bucket] : 0;
  __syncwarp();
  if (bucket >= 0 && peers >> lane == 1) {  // the last of them
    table[bucket] = before + __popc(peers);
    marks[bucket] = 0;
  }
  __syncwarp();
  return before + __popc(peers & ((1u << lane) - 1));
}

__device__ __forceinline__ int32_t reservation(const Arguments &a, int bucket) {
  return bucket == 0 ? 0 : max(0, a.reserved[bucket - 1]);
}

__device__ void fill_m_indices(const Arguments &a, const Shared &s, int first_warp, int warps) {
  const int lane = threadIdx.x % 32;
  for (int e = first_warp; e < a.experts; e += warps) {
    const int64_t begin = s.reserved_before[e + 1];
    const int64_t end = min(a.row_count, begin + reservation(a, e + 1));
    for (int64_t row = begin + lane; row < end; row += 32) a.m_indices[row] = e;
  }
}

// The tables that hold one value an expert.
__device__ void write_tables(const Arguments &a, const Shared &s) {
  const int32_t dropped = a.drop_negatives ? s.count[0] : 0;
  if (threadIdx.x == 0 && a.seg_indptr != nullptr) a.seg_indptr[0] = 0;
  for (int e = threadIdx.x; e < a.experts; e += threads()) {
    const int32_t count = s.count[e + 1];
    if (a.seg_indptr != nullptr) a.seg_indptr[e + 1] = s.before[e + 1] + count - dropped;
    if (a.masked_m != nullptr) a.masked_m[e] = a.m_max > 0 && count > a.m_max ? static_cast<int32_t>(a.m_max) : count;
    if (a.expert_start_loc != nullptr) a.expert_start_loc[e] = s.reserved_before[e + 1];
  }
}

// Where the slots of a bucket are in the order: packed one after the other, with those of -1 first or, dropped, last.
__device__ __forceinline__ int first_of(const Arguments &a, const Shared &s, int bucket) {
  if (!a.drop_negatives) return s.before[bucket];
  return bucket == 0 ? a.slots - s.count[0] : s.before[bucket] - s.count[0];
}

// A segment an expert, at least eight lanes (a memory sector) side by side: from the slots' side every one of these
// stores would be a transaction of its own. `first` and `step` count threads.
__device__ __forceinline__ void fill_reorder_topk_ids(const Arguments &a, const Shared &s, int first, int step) {
  const int log_lanes = max(3, 31 - __clz(step / (a.experts + 1) | 1));
  const int lanes = 1 << log_lanes;
#pragma unroll 1
  for (int b = first >> log_lanes; b <= a.experts; b += step >> log_lanes) {
    const int begin = first_of(a, s, b);
    const int count = s.count[b];
    for (int i = first & (lanes - 1); i < count; i += lanes) {
      store_index(a.reorder_topk_ids, a.ids_int64, begin + i, b - 1);
    }
  }
}

// A slot is the `position`th of its bucket.
__device__ __forceinline__ void place(const Arguments &a, const Shared &s, int slot, int bucket, int position) {
  int64_t row;
  int64_t limit = INT64_MAX;
  if (a.reserved != nullptr) {
    row = static_cast<int64_t>(s.reserved_before[bucket]) + position;
    limit = min(static_cast<int64_t>(reservation(a, bucket)), a.row_count - s.reserved_before[bucket]);
  } else if (a.m_max > 0) {
    row = (bucket - 1) * a.m_max + position;
    limit = bucket == 0 ? 0 : a.m_max;
  } else {
    row = s.before[bucket] + position - (a.drop_negatives ? s.count[0] : 0);
  }
  if (position >= limit) {
    if (bucket != 0) {
      gpu::report_index(a.status, a.op_index, a.limit_param, slot / a.topk, slot % a.topk, position, 0, max(0l, limit));
    }
    row = -1;
  }
  store_index(a.src2dst, a.src2dst_int64, slot, row);
  if (a.scatters_ids) store_index(a.reorder_topk_ids, a.ids_int64, first_of(a, s, bucket) + position, bucket - 1);
}

// The sums of earlier runs, instead of the runs' own; block_count receives the block's.
__device__ __forceinline__ void sum_runs(const Arguments &a, const Shared &s, int buckets) {
  for (int b = threadIdx.x; b < buckets; b += threads()) {
    int32_t counts[kMaxRuns];
#pragma unroll
    for (int run = 0; run < kMaxRuns; ++run) counts[run] = run < a.runs ? s.table[run * buckets + b] : 0;
    int32_t sum = 0;
#pragma unroll
    for (int run = 0; run < kMaxRuns; ++run) {
      if (run < a.runs) s.table[run * buckets + b] = sum;
      sum += counts[run];
    }
    s.block_count[b] = sum;
  }
}

// The buckets of a run's slots, four loads under way at a time.
__device__ __forceinline__ void keep_buckets(const Arguments &a, int32_t *kept, int begin, int end) {
  constexpr int kTogether = 4;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = begin; first < end; first += 32 * kTogether) {
    gpu::RawIndex raw[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) raw[i] = load_id(a, first + 32 * i + lane, end);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int slot = first + 32 * i + lane;
      if (slot < end) kept[slot - begin] = bucket_of<true>(a, raw[i], slot, end);
    }
  }
}

// What earlier blocks and all blocks counted. count_of(block, bucket) is what a block counted.
template <typename CountOf>
__device__ __forceinline__ void sum_blocks(const Shared &s, int buckets, int blocks, const CountOf &count_of) {
  for (int b = threadIdx.x; b < buckets; b += threads()) {
    int32_t sum = 0;
    int32_t earlier = 0;
#pragma unroll 8
    for (int block = 0; block < blocks; ++block) {
      if (block == static_cast<int>(blockIdx.x)) earlier = sum;
      sum += count_of(block, b);
    }
    s.earlier[b] = earlier;
    s.count[b] = sum;
  }
}

// kKeep: the slots' buckets and ranks fit into shared memory; otherwise they are found twice. Loops stay rolled: with
// one block at work, code that runs once takes longer to fetch than to execute. Blocks beyond `counting` fill m_indices
// alone.
template <bool kKeep, Together kTogether>
__global__ void __launch_bounds__(kMostThreads, 1) kernel(const Arguments a, int counting) {
  extern __shared__ __align__(16) int32_t memory[];
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int buckets = a.experts + 1;
  Shared s;
  s.marks = reinterpret_cast<uint32_t *>(memory);
  s.table = memory + a.runs * buckets;
  s.count = s.table + a.runs * buckets;
  s.before = s.count + buckets;
  s.block_count = s.before + buckets;
  s.earlier = s.block_count + buckets;
  s.reserved_before = s.earlier + buckets;
  s.kept = s.reserved_before + buckets;
#pragma unroll 1
  for (int i = threadIdx.x; 2 * i < a.runs * buckets; i += threads()) {
    reinterpret_cast<int4 *>(memory)[i] = make_int4(0, 0, 0, 0);  // reaches into count at most, which comes later
  }
  if (kTogether != kGrid) gpu::wait_for_earlier_work();

  const bool counts = static_cast<int>(blockIdx.x) < counting && warp < a.runs;
  const int begin = counts ? min(a.slots, static_cast<int>(blockIdx.x * a.runs + warp) * a.slots_per_run) : a.slots;
  const int end = min(a.slots, begin + a.slots_per_run);
  uint32_t *marks = s.marks + warp * buckets;
  int32_t *own = s.table + warp * buckets;
  int32_t *kept = s.kept + warp * a.slots_per_run;
  if (kKeep) keep_buckets(a, kept, begin, end);
  if (a.reserved != nullptr) {
    exclusive_scan<int64_t>(buckets, s.reserved_before, a.row_count, [&](int b) { return reservation(a, b); });
  }
  __syncthreads();
  if (static_cast<int>(blockIdx.x) >= counting) {
    fill_m_indices(a, s, (blockIdx.x - counting) * warps() + warp, (gridDim.x - counting) * warps());
    return;
  }

#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const int slot = first + lane;
    int bucket = -1;
    if (kKeep && slot < end) bucket = kept[slot - begin];
    if (!kKeep) bucket = bucket_of<true>(a, load_id(a, slot, end), slot, end);
    const int rank = rank_in_run(marks, own, bucket);
    if (kKeep && slot < end) kept[slot - begin] = bucket * kMaxRanks + rank;
  }
  __syncthreads();

  sum_runs(a, s, buckets);
  const auto scan_counts = [&] {
    exclusive_scan<int32_t>(buckets, s.before, INT32_MAX, [&](int b) { return s.count[b]; });
  };
  if constexpr (kTogether == kGrid) {
    auto grid = cooperative_groups::this_grid();
    for (int b = threadIdx.x; b < buckets; b += threads()) a.scratch[blockIdx.x * buckets + b] = s.block_count[b];
    grid.sync();
    sum_blocks(s, buckets, counting, [&](int block, int b) { return __ldcg(a.scratch + block * buckets + b); });
    auto read = grid.barrier_arrive();  // src2dst is written once every block has read its counts there
    scan_counts();
    grid.barrier_wait(std::move(read));
  } else if constexpr (kTogether == kCluster) {
#if __CUDA_ARCH__ >= 900
    auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    sum_blocks(s, buckets, counting, [&](int block, int b) {
      return *cluster.map_shared_rank(s.block_count + b, static_cast<unsigned>(block));
    });
    cluster.barrier_arrive();  // a block's memory has to last until the others have read it
    scan_counts();
#endif
  } else {
    sum_blocks(s, buckets, 1, [&](int, int b) { return s.block_count[b]; });
    scan_counts();
  }

  if (blockIdx.x == 0) write_tables(a, s);
  if (kTogether != kAlone && a.m_indices != nullptr) {
    fill_m_indices(a, s, blockIdx.x * warps() + warp, gridDim.x * warps());
  }
  if (a.reorder_topk_ids != nullptr && !a.scatters_ids) {
    fill_reorder_topk_ids(a, s, blockIdx.x * threads() + threadIdx.x, counting * threads());
  }
#pragma unroll 1
  for (int first = begin; first < end; first += 32) {
    const int slot = first + lane;
    int bucket = -1;
    int position = 0;
    if (kKeep) {
      if (slot < end) bucket = kept[slot - begin] / kMaxRanks;
      if (slot < end) position = s.earlier[bucket] + own[bucket] + kept[slot - begin] % kMaxRanks;
    } else {
      bucket = bucket_of<false>(a, load_id(a, slot, end), slot, end);
      position = rank_in_run(marks, own, bucket);
      if (bucket >= 0) position += s.earlier[bucket];
    }
    if (bucket >= 0) place(a, s, slot, bucket, position);
  }
#if __CUDA_ARCH__ >= 900
  if constexpr (kTogether == kCluster) cooperative_groups::this_cluster().barrier_wait();
#endif
}

}  // namespace

void run_cuda(const Problem &p) {
  const int32_t device = p.call->device.device_id;
  const int buckets = static_cast<int>(p.experts) + 1;
  Arguments a{};
  a.topk_ids = p.topk_ids.data;
  a.src2dst = p.src2dst;
  a.seg_indptr = p.seg_indptr;
  a.reorder_topk_ids = p.reorder_topk_ids;
  a.masked_m = p.masked_m;
  a.reserved = p.reserved;
  a.expert_start_loc = p.expert_start_loc;
  a.m_indices = p.m_indices;
  a.status = cuda::status_word(device);
  a.scratch = static_cast<int32_t *>(p.src2dst);
  a.row_count = p.row_count;
  a.m_max = p.m_max;
  a.slots = static_cast<int32_t>(p.slots);
  a.topk = static_cast<int32_t>(std::max<int64_t>(1, p.topk));
  a.experts = static_cast<int32_t>(p.experts);
  a.op_index = p.call->entry->index;
  a.ids_param = p.ids_param;
  a.limit_param = p.limit_param;
  a.ids_int64 = p.topk_ids.is_int64;
  a.src2dst_int64 = p.src2dst_int64;
  a.drop_negatives = p.drop_negatives;

  const auto shared_bytes = [&](bool keeps) {
    const int64_t words =
        (2 * a.runs + kTables) * static_cast<int64_t>(buckets) + (keeps ? a.runs * a.slots_per_run : 0);
    return static_cast<size_t>(4 * words);
  };
  const int fitting =
      std::min<int>(kMaxRuns, (gpu::kMostShared / 4 - kMostKept - 32 * kMaxRuns - kTables * buckets) / (2 * buckets));
  // No more threads than have something to do: every one costs its share of each instruction.
  int threads = kMostThreads;
  const auto divide_among = [&](int64_t blocks) {
    a.runs = std::clamp(divide_up(p.slots, blocks * kRunSlots), 1, fitting);
    a.slots_per_run = divide_up(divide_up(p.slots, blocks * a.runs), 32) * 32;
    a.scatters_ids = a.reorder_topk_ids != nullptr && p.slots <= blocks * kScattered;
    threads = std::min(kMostThreads, 32 * std::max(a.runs, divide_up(buckets, 32)));
  };
  const bool clusters = cuda::facts(device).cc_major >= 9;
  if (run_few(p, a)) return;
  if (p.slots <= (clusters ? kBlockSlots : kMostKept)) {
    divide_among(1);
    const int filling = p.m_indices == nullptr ? 0 : divide_up(p.experts, threads / 32);
    gpu::kernel_of<&kernel<true, kAlone>>().launch(*p.call, dim3(1 + static_cast<unsigned>(filling)), dim3(threads),
                                                   shared_bytes(true), a, 1);
    return;
  }
  if (clusters && p.slots <= kClusterSlots) {
    divide_among(kClusterBlocks);
    gpu::kernel_of<&kernel<true, kCluster>>().launch_cluster(*p.call, kClusterBlocks, dim3(threads), shared_bytes(true),
                                                             a, kClusterBlocks);
    return;
  }
  // Each block's counts must fit into the part of src2dst that its slots have, hence no fewer slots than buckets.
  const int64_t wanted = divide_up(p.slots, std::max(kGridBlockSlots, buckets));
  const auto launch = [&](gpu::Kernel &kernel, bool keeps) {
    divide_among(wanted);
    threads = kMostThreads;
    const int64_t resident =
        int64_t{kernel.resident_blocks(device, threads, shared_bytes(keeps))} * cuda::facts(device).sm_count;
    if (keeps && resident < wanted) return false;  // a block's share would exceed what it keeps
    const auto blocks = static_cast<int>(std::min(wanted, resident));
    divide_among(blocks);
    threads = kMostThreads;
    kernel.launch_cooperative(*p.call, dim3(static_cast<unsigned>(blocks)), dim3(threads), shared_bytes(keeps), a,
                              blocks);
    return true;
  };
  if (!launch(gpu::kernel_of<&kernel<true, kGrid>>(), true)) launch(gpu::kernel_of<&kernel<false, kGrid>>(), false);
}

}  // namespace epmoe::expert_order
