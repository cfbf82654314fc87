// What the kernels that move rows to their slots share: a call's arguments, and the slots of a token among a warp's
// lanes.
#pragma once

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
  bool src2dst_int64, topk_ids_int64, scales_by_expert, power_of_two, streams;
};

struct Slot {
  uint32_t row;
  float scale;
};

// kNoRow for a remote slot, and for one that there is not.
__device__ __forceinline__ Slot resolve_slot(const Arguments &a, int64_t token, uint32_t k) {
  if (k >= a.topk) return {kNoRow, 1.0f};
  const int64_t flat = token * a.topk + k;
  const gpu::RawIndex raw_row = gpu::load_raw(a.src2dst, a.src2dst_int64, flat);
  const gpu::RawIndex raw_id = gpu::load_raw(a.topk_ids, a.topk_ids_int64, flat);
  const int64_t destination = gpu::index_of(raw_row, a.src2dst_int64);
  const int64_t id = gpu::index_of(raw_id, a.topk_ids_int64);
  Slot slot{kNoRow, 1.0f};
  const bool local = a.topk_ids != nullptr ? id >= a.start_expert_id && id <= a.end_expert_id : destination >= 0;
  if (!local) return slot;
  if (a.scales_by_expert) {
    const int64_t expert = id - a.start_expert_id;
    if (expert >= a.scale_count) {
      gpu::report_index(a.status, a.op_index, a.ids_param, token, k, id, a.start_expert_id,
                        a.start_expert_id + a.scale_count);
      return slot;
    }
    slot.scale = __ldg(a.a1_scales + expert);
  }
  const uint64_t row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(a.dst_start);
  if (row >= a.row_count)
    gpu::report_index(a.status, a.op_index, a.src2dst_param, token, k, destination, a.dst_start,
                      a.dst_start + a.row_count);
  else
    slot.row = static_cast<uint32_t>(row);
  return slot;
}

// Up to 32 slots of a token, of which each lane has one, and which of them are local.
struct Slots {
  Slot mine;
  unsigned locals;
};

// Calls body(slots) for every 32 slots of a token that have local ones among them, all lanes of the warp together.
template <typename Body>
__device__ __forceinline__ void for_lanes(const Arguments &a, int64_t token, const Body &body) {
  for (uint32_t first = 0; first < a.topk; first += 32) {
    const Slot mine = resolve_slot(a, token, first + threadIdx.x % 32);
    const unsigned locals = __ballot_sync(kWarp, mine.row != kNoRow);
    if (locals != 0) body(Slots{mine, locals});
  }
}

// Calls body(row, scale) for every local slot of those that the lanes hold: eight at once where all are local.
template <typename Body>
__device__ __forceinline__ void for_slots(Slots slots, const Body &body) {
  constexpr int kTogether = 8;
  const Slot mine = slots.mine;
  unsigned locals = slots.locals;
#pragma unroll 1
  for (int base = 0; locals != 0; base += kTogether, locals >>= kTogether) {
    unsigned some = locals & ((1u << kTogether) - 1);
    if (some == (1u << kTogether) - 1) {
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        body(__shfl_sync(kWarp, mine.row, base + i), __shfl_sync(kWarp, mine.scale, base + i));
      }
      continue;
    }
#pragma unroll 1
    for (; some != 0; some &= some - 1) {
      const int k = base + __ffs(static_cast<int>(some)) - 1;
      body(__shfl_sync(kWarp, mine.row, k), __shfl_sync(kWarp, mine.scale, k));
    }
  }
}

}  // namespace
}  // namespace epmoe::scatter_rows
