// The weighted sum of rows on the CPU.
#include "ops/gather_sum.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/float16.h"
#include "core/simd.h"
#include "core/stream.h"
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

constexpr int64_t kColumns = 1024;     // what a thread takes of a token at a time
constexpr int64_t kStrip = 64;         // columns whose sums stay in registers
constexpr int64_t kBytesAhead = 8192;  // of a token's rows together, hinted before they are needed: rows lie anywhere

// Up to kColumns columns of a token's rows, in column strips over all rows, so that each is a stream of its own.
// `ahead` columns before they are needed they are hinted; after the `left` that the rows have, the next token's rows.
template <typename Element>
struct Rows {
  const typename Element::Storage *const *data;
  const typename Element::Storage *const *next;
  const float *weights;
  int64_t count, ahead, left;
};

template <typename Element>
EPMOE_INLINE void sum_strip(const Rows<Element> &rows, float *sum, int64_t i, int64_t n) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename Element::Storage));
  for (int64_t j = 0; j < n; ++j) sum[j] = 0.0f;
  for (int64_t k = 0; k < rows.count; ++k) {
    const auto *row = rows.data[k] + i;
    const float weight = rows.weights[k];
    const int64_t beyond = i + rows.ahead - rows.left;
    const auto *hint = beyond < 0 ? row + rows.ahead : rows.next[k] + beyond;
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(hint + j);
    for (int64_t j = 0; j < n; ++j) sum[j] = std::fma(Element::widen(row[j]), weight, sum[j]);
  }
}

// The loops that take the time, compiled once for each vector width the machine may have.
#define EPMOE_GATHER_SUM_LOOPS(Element, suffix)                                                              \
  EPMOE_SIMD void sum_rows_##suffix(float *acc, const Rows<Element> &rows, int64_t n) {                      \
    int64_t i = 0;                                                                                           \
    for (; i + kStrip <= n; i += kStrip) {                                                                   \
      float sum[kStrip];                                                                                     \
      sum_strip<Element>(rows, sum, i, kStrip);                                                              \
      for (int64_t j = 0; j < kStrip; ++j) acc[i + j] = sum[j];                                              \
    }                                                                                                        \
    if (i < n) sum_strip<Element>(rows, acc + i, i, n - i);                                                  \
  }                                                                                                          \
  EPMOE_SIMD void add_row_##suffix(float *acc, const Element::Storage *row, float factor, int64_t n) {       \
    for (int64_t i = 0; i < n; ++i) acc[i] = acc[i] * factor + Element::widen(row[i]);                       \
  }                                                                                                          \
  EPMOE_SIMD void store_row_##suffix(Element::Storage *out, const float *acc, float factor, int64_t n) {     \
    for (int64_t i = 0; i < n; ++i) out[i] = Element::narrow(acc[i] * factor);                               \
  }                                                                                                          \
  EPMOE_SIMD void add_row_rounded_##suffix(Element::Storage *acc, const Element::Storage *row,               \
                                           Element::Storage weight, int64_t n) {                             \
    for (int64_t i = 0; i < n; ++i) acc[i] = fma_rounded<Element>(row[i], weight, acc[i]);                   \
  }                                                                                                          \
  inline void sum_rows(Element, float *a, const Rows<Element> &r, int64_t n) { sum_rows_##suffix(a, r, n); } \
  inline void add_row(Element, float *a, const Element::Storage *r, float f, int64_t n) {                    \
    add_row_##suffix(a, r, f, n);                                                                            \
  }                                                                                                          \
  inline void store_row(Element, Element::Storage *o, const float *a, float f, int64_t n) {                  \
    store_row_##suffix(o, a, f, n);                                                                          \
  }                                                                                                          \
  inline void add_row_rounded(Element, Element::Storage *a, const Element::Storage *r, Element::Storage w,   \
                              int64_t n) {                                                                   \
    add_row_rounded_##suffix(a, r, w, n);                                                                    \
  }

EPMOE_GATHER_SUM_LOOPS(Float32, float32)
EPMOE_GATHER_SUM_LOOPS(Float16, float16)
EPMOE_GATHER_SUM_LOOPS(BFloat16, bfloat16)

// What a thread has at hand for a token, and for the one after it.
template <typename Element>
struct Scratch {
  std::vector<Slot> slots, next_slots;
  std::vector<const typename Element::Storage *> rows, next_rows;
  std::vector<float> weights;
};

// Columns [column, column + n) of one token.
template <typename Element>
void sum_columns(const Problem &p, Scratch<Element> &s, int64_t token, int64_t column, int64_t n, bool streams) {
  using Storage = typename Element::Storage;
  const auto *shared = static_cast<const Storage *>(p.shared_output);
  const auto *residual = static_cast<const Storage *>(p.residual);
  const int64_t at = token * p.hidden + column;
  Storage *out = static_cast<Storage *>(p.output) + at;
  const auto *rows = static_cast<const Storage *>(p.rows);
  s.rows.clear();
  s.next_rows.clear();
  s.weights.clear();
  for (size_t k = 0; k < s.slots.size(); ++k) {
    const Slot &after = k < s.next_slots.size() ? s.next_slots[k] : s.slots[k];
    s.rows.push_back(rows + s.slots[k].row * p.hidden + column);
    s.next_rows.push_back(rows + after.row * p.hidden);
    s.weights.push_back(s.slots[k].weight);
  }
  if (p.numerics == kFp32) {
    float acc[kColumns];
    const auto count = static_cast<int64_t>(s.slots.size());
    const int64_t bytes_ahead = std::clamp<int64_t>(kBytesAhead / p.topk, 512, 4096);
    const int64_t ahead = std::min(p.hidden, bytes_ahead / static_cast<int64_t>(sizeof(Storage)));
    const Rows<Element> r{s.rows.data(), s.next_rows.data(), s.weights.data(), count, ahead, p.hidden - column};
    sum_rows(Element(), acc, r, n);
    float factor = p.factor;
    for (const Storage *addend : {shared, residual}) {
      if (addend == nullptr) continue;
      add_row(Element(), acc, addend + at, factor, n);
      factor = 1.0f;
    }
    if (!streams) return store_row(Element(), out, acc, factor, n);
    Storage rounded[kColumns];
    store_row(Element(), rounded, acc, factor, n);
    return stream_copy(out, rounded, n * static_cast<int64_t>(sizeof(Storage)));
  }
  // The original's arithmetic: weights and every partial sum rounded to the activation dtype.
  const Storage factor = Element::narrow(p.factor);
  const Storage one = Element::narrow(1.0f);
  std::fill(out, out + n, Storage{0});
  for (size_t k = 0; k < s.rows.size(); ++k) {
    Storage weight = Element::narrow(s.weights[k]);
    if (p.factor != 1.0f) weight = Element::narrow(Element::widen(weight) * Element::widen(factor));
    add_row_rounded(Element(), out, s.rows[k], weight, n);
  }
  if (shared != nullptr) add_row_rounded(Element(), out, shared + at, one, n);
  if (residual != nullptr) add_row_rounded(Element(), out, residual + at, one, n);
}

template <typename Element>
void run_typed(const Problem &p) {
  Offence offence;
  const int64_t blocks = (p.hidden + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 16384 / (p.topk * std::min(p.hidden, kColumns)));
  const bool streams = exceeds_caches(p.tokens * (p.topk + 1) * p.hidden * itemsize(p.dtype));
  parallel_for(p.tokens * blocks, grain, [&](int64_t begin, int64_t end) {
    Scratch<Element> scratch;
    int64_t gathered = -1;  // the token whose slots are the next ones
    for (int64_t work = begin; work < end; ++work) {
      const int64_t token = work / blocks;
      const int64_t column = work % blocks * kColumns;
      if (gathered != token + 1) {
        if (gathered != token) gather_slots<Element>(p, token, scratch.next_slots, offence);
        scratch.slots.swap(scratch.next_slots);
        scratch.next_slots.clear();
        gathered = token + 1;
        if (gathered < p.tokens) gather_slots<Element>(p, gathered, scratch.next_slots, offence);
      }
      sum_columns<Element>(p, scratch, token, column, std::min(kColumns, p.hidden - column), streams);
    }
    if (streams) stream_end();
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
