// What the kernels that order slots by expert share.
#pragma once

#include "ops/common.cuh"
#include "ops/expert_order.h"

namespace epmoe::expert_order {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kClusterBlocks = 8;  // that Hopper lets read each other's shared memory
constexpr unsigned kWarp = 0xffffffffu;

__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x) / 32; }

int32_t divide_up(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

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
  int32_t runs;           // warps of a block that count
  int32_t slots_per_run;  // a multiple of 32
  int32_t op_index, ids_param, limit_param;
  bool ids_int64, src2dst_int64, drop_negatives, scatters_ids;
};

__device__ __forceinline__ void store_index(void *data, bool is_int64, int64_t i, int64_t value) {
  if (is_int64)
    static_cast<long long *>(data)[i] = value;
  else
    static_cast<int *>(data)[i] = static_cast<int>(value);
}

__device__ __forceinline__ gpu::RawIndex load_id(const Arguments &a, int slot, int end) {
  return gpu::load_raw(slot < end ? a.topk_ids : nullptr, a.ids_int64, slot);
}

// 0 for -1 and for what is out of range, e + 1 for expert e; -1 past the end.
template <bool kReport>
__device__ __forceinline__ int bucket_of(const Arguments &a, gpu::RawIndex raw, int slot, int end) {
  if (slot >= end) return -1;
  const int64_t id = gpu::index_of(raw, a.ids_int64);
  if (id >= 0 && id < a.experts) return static_cast<int>(id) + 1;
  if (kReport && id != -1) {
    gpu::report_index(a.status, a.op_index, a.ids_param, slot / a.topk, slot % a.topk, id, -1, a.experts);
  }
  return 0;
}

// Inclusive running sum over the warp.
template <typename Sum>
__device__ __forceinline__ Sum warp_scan(Sum sum) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Sum other = __shfl_up_sync(kWarp, sum, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) sum += other;
  }
  return sum;
}

}  // namespace
}  // namespace epmoe::expert_order
