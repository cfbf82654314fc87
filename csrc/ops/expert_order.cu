// The order of slots by expert on CUDA. Each warp counts a run of slots in its own row of a table in shared memory;
// running sums over warps (and blocks) and over experts turn counts into positions; a second pass places the slots.
// Equal ids within a warp find each other by match_any, so that order is kept without atomics.
#include <cooperative_groups.h>

#include <algorithm>

#include "ops/common.cuh"
#include "ops/expert_order.h"

namespace epmoe::expert_order {
namespace {

constexpr int kMaxWarps = 16;
constexpr int kBlockSlots = 8192;  // what one block counts before more blocks pay for their synchronisation

struct Arguments {
  const void *topk_ids;
  void *src2dst;
  int64_t *seg_indptr;
  void *reorder_topk_ids;
  int32_t *masked_m;
  const int32_t *reserved;
  int32_t *expert_start_loc;
  int32_t *m_indices;
  cuda::StatusWord *status;
  int32_t *scratch;  // [blocks][buckets]: memory of src2dst, which is written last
  int64_t row_count, m_max;
  int32_t slots, topk, experts;
  int32_t slots_per_warp;  // a multiple of 32
  int32_t op_index, ids_param, limit_param;
  bool ids_int64, src2dst_int64, drop_negatives;
};

__device__ __forceinline__ void store_index(void *data, bool is_int64, int64_t i, int64_t value) {
  if (is_int64)
    static_cast<long long *>(data)[i] = value;
  else
    static_cast<int *>(data)[i] = static_cast<int>(value);
}

// 0 for -1 and for what is out of range, e + 1 for expert e; -1 past the end.
template <bool kReport>
__device__ __forceinline__ int bucket_of(const Arguments &a, int slot, int end) {
  if (slot >= end) return -1;
  const int64_t id = gpu::load_index(a.topk_ids, a.ids_int64, slot);
  if (id >= 0 && id < a.experts) return static_cast<int>(id) + 1;
  if (kReport && id != -1) {
    gpu::report_index(a.status, a.op_index, a.ids_param, slot / a.topk, slot % a.topk, id, -1, a.experts);
  }
  return 0;
}

// Exclusive running sum of n values, by one warp; no sum is told as more than `most`.
template <typename Value>
__device__ void exclusive_scan(int n, int32_t *out, int64_t most, const Value &value) {
  const int lane = threadIdx.x % 32;
  int64_t carry = 0;
  for (int first = 0; first < n; first += 32) {
    const int i = first + lane;
    const int64_t own = i < n ? value(i) : 0;
    int64_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int64_t other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (i < n) out[i] = static_cast<int32_t>(min(most, carry + sum - own));
    carry += __shfl_sync(0xffffffffu, sum, 31);
  }
}

// Shared memory: table[warps][buckets], count[buckets], before[buckets], and reserved_before[buckets] if asked for.
struct Shared {
  int32_t *table, *count, *before, *reserved_before;
};

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
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) {
    const int32_t count = s.count[e + 1];
    if (a.seg_indptr != nullptr) a.seg_indptr[e + 1] = s.before[e + 1] + count - dropped;
    if (a.masked_m != nullptr) a.masked_m[e] = a.m_max > 0 && count > a.m_max ? static_cast<int32_t>(a.m_max) : count;
    if (a.expert_start_loc != nullptr) a.expert_start_loc[e] = s.reserved_before[e + 1];
  }
}

__device__ __forceinline__ void place(const Arguments &a, const Shared &s, int slot, int bucket, int position) {
  const int invalid = s.count[0];
  int64_t row;
  int64_t limit = INT64_MAX;
  if (a.reserved != nullptr) {
    row = static_cast<int64_t>(s.reserved_before[bucket]) + position;
    limit = min(static_cast<int64_t>(reservation(a, bucket)), a.row_count - s.reserved_before[bucket]);
  } else if (a.m_max > 0) {
    row = (bucket - 1) * a.m_max + position;
    limit = bucket == 0 ? 0 : a.m_max;
  } else {
    row = s.before[bucket] + position - (a.drop_negatives ? invalid : 0);
  }
  if (position >= limit) {
    if (bucket != 0) {
      gpu::report_index(a.status, a.op_index, a.limit_param, slot / a.topk, slot % a.topk, position, 0, max(0l, limit));
    }
    row = -1;
  }
  store_index(a.src2dst, a.src2dst_int64, slot, row);
  if (a.reorder_topk_ids == nullptr) return;
  int at = s.before[bucket] + position;
  if (a.drop_negatives) at = bucket == 0 ? a.slots - invalid + position : at - invalid;
  store_index(a.reorder_topk_ids, a.ids_int64, at, bucket - 1);
}

// Blocks beyond `counting` fill m_indices alone.
template <bool kCooperative>
__global__ void __launch_bounds__(32 * kMaxWarps) kernel(const Arguments a, int counting) {
  extern __shared__ int32_t memory[];
  const int warps = blockDim.x / 32;
  const int warp = threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  const int buckets = a.experts + 1;
  Shared s;
  s.table = memory;
  s.count = s.table + warps * buckets;
  s.before = s.count + buckets;
  s.reserved_before = s.before + buckets;

  if (a.reserved != nullptr && warp == warps - 1) {
    exclusive_scan(buckets, s.reserved_before, a.row_count, [&](int b) { return reservation(a, b); });
  }
  if (static_cast<int>(blockIdx.x) >= counting) {
    __syncthreads();
    fill_m_indices(a, s, (blockIdx.x - counting) * warps + warp, (gridDim.x - counting) * warps);
    return;
  }
  for (int i = threadIdx.x; i < warps * buckets; i += blockDim.x) s.table[i] = 0;
  __syncthreads();

  int32_t *own = s.table + warp * buckets;
  const int begin = min(a.slots, static_cast<int>((blockIdx.x * warps + warp)) * a.slots_per_warp);
  const int end = min(a.slots, begin + a.slots_per_warp);
#pragma unroll 4
  for (int first = begin; first < end; first += 32) {
    const int bucket = bucket_of<true>(a, first + static_cast<int>(lane), end);
    const unsigned peers = __match_any_sync(0xffffffffu, bucket);
    if (bucket >= 0 && (peers & ((1u << lane) - 1)) == 0) own[bucket] += __popc(peers);
    __syncwarp();
  }
  __syncthreads();

  for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
    int32_t sum = 0;
    for (int w = 0; w < warps; ++w) {
      const int32_t count = s.table[w * buckets + b];
      s.table[w * buckets + b] = sum;
      sum += count;
    }
    s.count[b] = sum;
    if (kCooperative) a.scratch[blockIdx.x * buckets + b] = sum;
  }
  if (kCooperative) {
    cooperative_groups::this_grid().sync();
    for (int b = threadIdx.x; b < buckets; b += blockDim.x) {
      int32_t sum = 0;
      int32_t earlier = 0;
#pragma unroll 8
      for (int block = 0; block < counting; ++block) {
        if (block == static_cast<int>(blockIdx.x)) earlier = sum;
        sum += __ldcg(a.scratch + block * buckets + b);
      }
      for (int w = 0; w < warps; ++w) s.table[w * buckets + b] += earlier;
      s.count[b] = sum;
    }
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  if (warp == 0) {
    exclusive_scan(buckets, s.before, INT32_MAX, [&](int b) { return s.count[b]; });
  }
  __syncthreads();

  if (blockIdx.x == 0) write_tables(a, s);
  if (kCooperative && a.m_indices != nullptr) {
    fill_m_indices(a, s, blockIdx.x * warps + warp, gridDim.x * warps);
  }
#pragma unroll 2
  for (int first = begin; first < end; first += 32) {
    const int slot = first + static_cast<int>(lane);
    const int bucket = bucket_of<false>(a, slot, end);
    const unsigned peers = __match_any_sync(0xffffffffu, bucket);
    const int leader = __ffs(peers) - 1;
    int position = 0;
    if (bucket >= 0 && leader == static_cast<int>(lane)) {
      position = own[bucket];
      own[bucket] = position + __popc(peers);
    }
    position = __shfl_sync(0xffffffffu, position, leader) + __popc(peers & ((1u << lane) - 1));
    if (bucket >= 0) place(a, s, slot, bucket, position);
    __syncwarp();
  }
}

int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

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

  constexpr int kSharedBytes = 48 * 1024;  // what a block gets on every GPU without asking
  const int fitting = kSharedBytes / (4 * buckets) - 3;
  const int warps = std::clamp(divide_up(p.slots, 32), 4, std::min(kMaxWarps, fitting));
  const size_t shared = static_cast<size_t>(warps + 3) * buckets * 4;
  const unsigned threads = 32u * static_cast<unsigned>(warps);
  if (p.slots <= kBlockSlots) {
    a.slots_per_warp = divide_up(divide_up(p.slots, warps), 32) * 32;
    const int filling = p.m_indices == nullptr ? 0 : divide_up(p.experts, warps);
    gpu::kernel_of<&kernel<false>>().launch(dim3(1 + static_cast<unsigned>(filling)), dim3(threads), p.call->stream,
                                            shared, a, 1);
    return;
  }
  auto &cooperative = gpu::kernel_of<&kernel<true>>();
  // Each block's counts must fit into the part of src2dst that its slots have, hence no fewer slots than buckets.
  const int resident = cooperative.resident_blocks(threads, shared) * cuda::facts(device).sm_count;
  const int blocks = std::min(resident, divide_up(p.slots, std::max(kBlockSlots / 2, buckets)));
  a.slots_per_warp = divide_up(divide_up(p.slots, static_cast<int64_t>(blocks) * warps), 32) * 32;
  cooperative.launch_cooperative(dim3(static_cast<unsigned>(blocks)), dim3(threads), p.call->stream, shared, a, blocks);
}

}  // namespace epmoe::expert_order
