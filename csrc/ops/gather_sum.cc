// The weighted sum of rows on the CPU.
#include "ops/gather_sum.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/float16.h"
#include "core/simd.h"
#include "core/threads.h"

namespace epmoe::gather_sum {
namespace {

// One slot whose row is summed, with its weight as float32.
struct Slot {
  uint32_t row;
  float weight;
};

template <typename Element>
float read_weight(const Problem &p, int64_t i) {
  if (p.weights == nullptr) return 1.0f;
  if (p.weights_float32) return static_cast<const float *>(p.weights)[i];
  return Element::widen(static_cast<const typename Element::Storage *>(p.weights)[i]);
}

template <typename Element>
void gather_slots(const Problem &p, int64_t token, std::vector<Slot> &slots, Offence &offence) {
  slots.clear();
  for (int64_t k = 0; k < p.topk; ++k) {
    const int64_t flat = token * p.topk + k;
    if (p.topk_ids && (p.topk_ids[flat] < p.start_expert_id || p.topk_ids[flat] > p.end_expert_id)) continue;
    const int64_t destination = p.src2dst ? p.src2dst[flat] : flat;
    if (!p.topk_ids && destination < 0) continue;
    const auto row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(p.dst_start);
    if (row >= static_cast<uint64_t>(p.row_count)) {
      offence.report(flat);
      continue;
    }
    slots.push_back({static_cast<uint32_t>(row), read_weight<Element>(p, flat)});
  }
}

constexpr int64_t kColumns = 1024;  // columns summed at a time: the accumulators stay in the first-level cache

// The two loops that take the time, compiled once for each vector width the machine may have.
#define EPMOE_GATHER_SUM_LOOPS(Element, suffix)                                                            \
  EPMOE_SIMD void add_row_##suffix(float *acc, const Element::Storage *row, float weight, int64_t n) {     \
    for (int64_t i = 0; i < n; ++i) acc[i] = std::fma(Element::widen(row[i]), weight, acc[i]);             \
  }                                                                                                        \
  EPMOE_SIMD void store_row_##suffix(Element::Storage *out, const float *acc, float factor, int64_t n) {   \
    for (int64_t i = 0; i < n; ++i) out[i] = Element::narrow(acc[i] * factor);                             \
  }                                                                                                        \
  EPMOE_SIMD void add_row_rounded_##suffix(Element::Storage *acc, const Element::Storage *row,             \
                                           Element::Storage weight, int64_t n) {                           \
    for (int64_t i = 0; i < n; ++i) acc[i] = fma_rounded<Element>(row[i], weight, acc[i]);                 \
  }                                                                                                        \
  inline void add_row(Element, float *a, const Element::Storage *r, float w, int64_t n) {                  \
    add_row_##suffix(a, r, w, n);                                                                          \
  }                                                                                                        \
  inline void store_row(Element, Element::Storage *o, const float *a, float f, int64_t n) {                \
    store_row_##suffix(o, a, f, n);                                                                        \
  }                                                                                                        \
  inline void add_row_rounded(Element, Element::Storage *a, const Element::Storage *r, Element::Storage w, \
                              int64_t n) {                                                                 \
    add_row_rounded_##suffix(a, r, w, n);                                                                  \
  }

EPMOE_GATHER_SUM_LOOPS(Float32, float32)
EPMOE_GATHER_SUM_LOOPS(Float16, float16)
EPMOE_GATHER_SUM_LOOPS(BFloat16, bfloat16)

template <typename Storage>
void prefetch(const Storage *row, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Storage));
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(row + i);
}

// Columns [column, column + n) of one token.
template <typename Element>
void sum_columns(const Problem &p, const std::vector<Slot> &slots, int64_t token, int64_t column, int64_t n) {
  using Storage = typename Element::Storage;
  const auto *rows = static_cast<const Storage *>(p.rows) + column;
  const auto *shared = static_cast<const Storage *>(p.shared_output);
  const auto *residual = static_cast<const Storage *>(p.residual);
  const int64_t at = token * p.hidden + column;
  Storage *out = static_cast<Storage *>(p.output) + at;
  if (p.numerics == kFp32) {
    float acc[kColumns] = {};
    for (size_t k = 0; k < slots.size(); ++k) {
      // Rows lie anywhere: without a hint each would be waited for in turn.
      if (k + 1 < slots.size()) prefetch(rows + slots[k + 1].row * p.hidden, n);
      add_row(Element(), acc, rows + slots[k].row * p.hidden, slots[k].weight, n);
    }
    const bool addends = shared != nullptr || residual != nullptr;
    if (addends && p.factor != 1.0f) {
      for (int64_t i = 0; i < n; ++i) acc[i] *= p.factor;
    }
    if (shared != nullptr) add_row(Element(), acc, shared + at, 1.0f, n);
    if (residual != nullptr) add_row(Element(), acc, residual + at, 1.0f, n);
    store_row(Element(), out, acc, addends ? 1.0f : p.factor, n);
    return;
  }
  // The original's arithmetic: weights and every partial sum rounded to the activation dtype.
  const Storage factor = Element::narrow(p.factor);
  const Storage one = Element::narrow(1.0f);
  std::fill(out, out + n, Storage{0});
  for (const Slot &slot : slots) {
    Storage weight = Element::narrow(slot.weight);
    if (p.factor != 1.0f) weight = Element::narrow(Element::widen(weight) * Element::widen(factor));
    add_row_rounded(Element(), out, rows + slot.row * p.hidden, weight, n);
  }
  if (shared != nullptr) add_row_rounded(Element(), out, shared + at, one, n);
  if (residual != nullptr) add_row_rounded(Element(), out, residual + at, one, n);
}

template <typename Element>
void run_typed(const Problem &p) {
  Offence offence;
  const int64_t blocks = (p.hidden + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 16384 / (p.topk * std::min(p.hidden, kColumns)));
  parallel_for(p.tokens * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<Slot> slots;
    int64_t gathered = -1;
    for (int64_t work = begin; work < end; ++work) {
      const int64_t token = work / blocks;
      const int64_t column = work % blocks * kColumns;
      if (token != gathered) gather_slots<Element>(p, token, slots, offence);
      gathered = token;
      sum_columns<Element>(p, slots, token, column, std::min(kColumns, p.hidden - column));
    }
  });
  if (!offence.any()) return;
  offence.raise(p.call->entry->op->params[p.src2dst_param].name, p.src2dst[offence.first()], p.dst_start,
                p.dst_start + p.row_count, p.topk,
                "The slot was skipped and the rest computed: the output of that token is incomplete");
}

}  // namespace

void check_sizes(const Problem &p, int rows_param, int output_param, int topk_param) {
  const auto name = [&](int param) { return p.call->entry->op->params[param].name; };
  if (p.topk < 1) {
    fail(EPMOE_ERR_SHAPE, name(topk_param), "a size K of 1 or more", "K = 0", "Pass at least one expert a token");
  }
  if (p.topk > INT32_MAX || p.hidden > INT32_MAX) {
    fail(EPMOE_ERR_SHAPE, name(p.topk > INT32_MAX ? topk_param : output_param), "sizes K and H below 2^31",
         std::to_string(std::max(p.topk, p.hidden)), "Split the call");
  }
  if (p.row_count >= static_cast<int64_t>(kNoRow)) {
    fail(EPMOE_ERR_SHAPE, name(rows_param), "fewer than 2^32 - 1 rows", std::to_string(p.row_count), "Split the call");
  }
}

void run_cpu(const Problem &p) {
  switch (p.dtype) {
    case EPMOE_FLOAT32:
      return run_typed<Float32>(p);
    case EPMOE_FLOAT16:
      return run_typed<Float16>(p);
    default:
      return run_typed<BFloat16>(p);
  }
}

}  // namespace epmoe::gather_sum
