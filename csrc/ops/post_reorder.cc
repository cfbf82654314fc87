// post_reorder: gathers the rows that a token's experts produced and sums them with the router's weights.
// Semantics: SGLang's post_reorder_triton_kernel and deepep_post_reorder_triton_kernel.
#include "ops/post_reorder.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/float16.h"
#include "core/simd.h"
#include "core/threads.h"

namespace epmoe::post_reorder {
namespace {

constexpr int64_t kMaxSize = INT32_MAX;
constexpr const char *kNumericsChoices[] = {"fp32", "triton"};

void validate(const Call &call) {
  const Problem p = problem_of(call);
  if (p.topk < 1) {
    fail(EPMOE_ERR_SHAPE, "topk_weights", "shape [T, K] with K of 1 or more", "K = 0",
         "Pass at least one expert a token");
  }
  if (p.start_expert_id > p.end_expert_id) {
    fail(EPMOE_ERR_VALUE, "end_expert_id", "start_expert_id (" + std::to_string(p.start_expert_id) + ") or more",
         std::to_string(p.end_expert_id), "The range is inclusive at both ends");
  }
  if (p.topk > kMaxSize || p.hidden > kMaxSize) {
    fail(EPMOE_ERR_SHAPE, p.topk > kMaxSize ? "topk_weights" : "output", "sizes K and H below 2^31",
         std::to_string(std::max(p.topk, p.hidden)), "Split the call");
  }
  if (p.rows >= static_cast<int64_t>(kNoRow)) {
    fail(EPMOE_ERR_SHAPE, "down_output", "fewer than 2^32 - 1 rows", std::to_string(p.rows), "Split the call");
  }
}

int64_t read_index(const void *data, int32_t dtype, int64_t i) {
  return dtype == EPMOE_INT64 ? static_cast<const int64_t *>(data)[i] : static_cast<const int32_t *>(data)[i];
}

// One slot whose row is summed, with its weight as float32.
struct Slot {
  uint32_t row;
  float weight;
};

// The first index out of range in slot order, whichever thread meets it.
class Offence {
 public:
  void report(int64_t flat_slot) {
    int64_t known = first_.load(std::memory_order_relaxed);
    while (flat_slot < known && !first_.compare_exchange_weak(known, flat_slot)) {
    }
  }
  int64_t first() const { return first_.load(); }

 private:
  std::atomic<int64_t> first_{INT64_MAX};
};

template <typename Element>
float read_weight(const Call &call, int64_t i) {
  if (call.dtypes[kTopkWeights] == EPMOE_FLOAT32) return call.data<const float>(kTopkWeights)[i];
  return Element::widen(call.data<const typename Element::Storage>(kTopkWeights)[i]);
}

template <typename Element>
void gather_slots(const Call &call, const Problem &p, int64_t token, std::vector<Slot> &slots, Offence &offence) {
  slots.clear();
  const void *ids = call.data<const void>(kTopkIds);
  const void *src2dst = call.data<const void>(kSrc2dst);
  for (int64_t k = 0; k < p.topk; ++k) {
    const int64_t flat = token * p.topk + k;
    if (ids != nullptr) {
      const int64_t id = read_index(ids, call.dtypes[kTopkIds], flat);
      if (id < p.start_expert_id || id > p.end_expert_id) continue;
    }
    const int64_t destination = read_index(src2dst, call.dtypes[kSrc2dst], flat);
    if (ids == nullptr && destination < 0) continue;
    const auto row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(p.dst_start);
    if (row >= static_cast<uint64_t>(p.rows)) {
      offence.report(flat);
      continue;
    }
    slots.push_back({static_cast<uint32_t>(row), read_weight<Element>(call, flat)});
  }
}

constexpr int64_t kColumns = 1024;  // columns summed at a time: the accumulators stay in the first-level cache

// The two loops that take the time, compiled once for each vector width the machine may have.
#define EPMOE_POST_REORDER_LOOPS(Element, suffix)                                                          \
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

EPMOE_POST_REORDER_LOOPS(Float32, float32)
EPMOE_POST_REORDER_LOOPS(Float16, float16)
EPMOE_POST_REORDER_LOOPS(BFloat16, bfloat16)

template <typename Element>
void sum_columns(const Problem &p, const std::vector<Slot> &slots, const typename Element::Storage *rows,
                 typename Element::Storage *out, int64_t column, int64_t n) {
  using Storage = typename Element::Storage;
  if (p.numerics == kFp32) {
    float acc[kColumns] = {};
    for (const Slot &slot : slots) add_row(Element(), acc, rows + slot.row * p.hidden + column, slot.weight, n);
    store_row(Element(), out, acc, p.factor, n);
    return;
  }
  // The original's arithmetic: weights and every partial sum rounded to the activation dtype.
  const Storage factor = Element::narrow(p.factor);
  std::fill(out, out + n, Storage{0});
  for (const Slot &slot : slots) {
    Storage weight = Element::narrow(slot.weight);
    if (p.factor != 1.0f) weight = Element::narrow(Element::widen(weight) * Element::widen(factor));
    add_row_rounded(Element(), out, rows + slot.row * p.hidden + column, weight, n);
  }
}

template <typename Element>
void run_typed(const Call &call) {
  using Storage = typename Element::Storage;
  const Problem p = problem_of(call);
  const auto *rows = call.data<const Storage>(kDownOutput);
  auto *output = call.data<Storage>(kOutput);
  Offence offence;
  const int64_t blocks = (p.hidden + kColumns - 1) / kColumns;
  const int64_t grain = std::max<int64_t>(1, 16384 / (p.topk * std::min(p.hidden, kColumns)));
  parallel_for(p.tokens * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<Slot> slots;
    int64_t gathered = -1;
    for (int64_t work = begin; work < end; ++work) {
      const int64_t token = work / blocks;
      const int64_t column = work % blocks * kColumns;
      if (token != gathered) gather_slots<Element>(call, p, token, slots, offence);
      gathered = token;
      sum_columns<Element>(p, slots, rows, output + token * p.hidden + column, column,
                           std::min(kColumns, p.hidden - column));
    }
  });
  if (offence.first() == INT64_MAX) return;
  const int64_t value = read_index(call.data<const void>(kSrc2dst), call.dtypes[kSrc2dst], offence.first());
  fail(EPMOE_ERR_INDEX_OUT_OF_RANGE, "src2dst",
       "an index in [" + std::to_string(p.dst_start) + ", " + std::to_string(p.dst_start + p.rows) + ")",
       std::to_string(value) + " at token " + std::to_string(offence.first() / p.topk) + ", slot " +
           std::to_string(offence.first() % p.topk),
       "The slot was skipped and the rest computed: the output of that token is incomplete");
}

void run_cpu(const Call &call) {
  switch (call.dtypes[kDownOutput]) {
    case EPMOE_FLOAT32:
      return run_typed<Float32>(call);
    case EPMOE_FLOAT16:
      return run_typed<Float16>(call);
    default:
      return run_typed<BFloat16>(call);
  }
}

const Op kOp = {
    "post_reorder",
    "Sums, for every token, the rows its local experts produced, each times the router's weight: output[t] = "
    "routed_scaling_factor * sum over slots k of topk_weights[t,k] * down_output[src2dst[t,k] - dst_start]. Slots of "
    "experts outside [start_expert_id, end_expert_id] are skipped, their rows never read; a token without local slots "
    "gets zeros.",
    {"R", "H", "T", "K"},
    {
        tensor_in("down_output", "...R,H", kActivations,
                  "Rows of the experts' outputs; rows of skipped slots may be uninitialised."),
        tensor_out("output", "T,H", 0, "Receives one row a token; every element is written.", kDownOutput),
        tensor_in("src2dst", "T*K|T,K", kIndices,
                  "Row of each slot, counted from dst_start; negative entries are skipped when topk_ids is absent."),
        optional(tensor_in("topk_ids", "T,K", kIndices,
                           "Expert of each slot; without it a slot is local when src2dst is not negative (DeepEP).")),
        tensor_in("topk_weights", "T,K", bit(EPMOE_FLOAT32), "Router weight of each slot.", kDownOutput),
        integer("start_expert_id", 0, -kMaxInteger, kMaxInteger, "First local expert."),
        integer("end_expert_id", 2147483647, -kMaxInteger, kMaxInteger, "Last local expert, inclusive."),
        integer("dst_start", 0, -kMaxInteger, kMaxInteger, "Subtracted from src2dst to give the row."),
        real("routed_scaling_factor", 1.0, "Multiplies the sum."),
        choice("numerics", kNumericsChoices, 2,
               "fp32: float32 accumulation in slot order, one final rounding. triton: the original kernel's "
               "arithmetic, every partial sum and every weight rounded to the activation dtype."),
    },
    validate,
    run_cpu,
};
const RegisterOp kRegistered(&kOp);

}  // namespace
}  // namespace epmoe::post_reorder
