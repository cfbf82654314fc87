// The order of slots by expert on the CPU: each part of the slots is counted, then placed where the counts say.
#include "ops/expert_order.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/threads.h"

namespace epmoe::expert_order {
namespace {

constexpr int64_t kPart = 16384;  // slots that are worth a thread

void store(void *data, bool is_int64, int64_t i, int64_t value) {
  if (is_int64)
    static_cast<int64_t *>(data)[i] = value;
  else
    static_cast<int32_t *>(data)[i] = static_cast<int32_t>(value);
}

class Order {
 public:
  explicit Order(const Problem &p) : p_(p), buckets_(p.experts + 1) {}

  void run() {
    const int64_t parts = std::clamp<int64_t>(p_.slots / kPart, 1, 2 * epmoe_cpu_threads());
    const int64_t each = (p_.slots + parts - 1) / parts;
    const auto part_of = [&](int64_t part) {
      return std::pair(std::min(p_.slots, part * each), std::min(p_.slots, (part + 1) * each));
    };
    std::vector<int64_t> next(static_cast<size_t>(parts * buckets_));  // [part][bucket]: counts, then positions
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const auto [from, to] = part_of(part);
        for (int64_t i = from; i < to; ++i) ++next[static_cast<size_t>(part * buckets_ + bucket(i))];
      }
    });
    number(next, parts);
    write_tables();
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        const auto [from, to] = part_of(part);
        for (int64_t i = from; i < to; ++i) place(i, next[static_cast<size_t>(part * buckets_ + bucket(i))]++);
      }
    });
    raise();
  }

 private:
  // 0 for -1 and for what is out of range, e + 1 for expert e.
  int64_t bucket(int64_t slot) {
    const int64_t id = p_.topk_ids[slot];
    if (id >= 0 && id < p_.experts) return id + 1;
    if (id != -1) bad_ids_.report(slot);
    return 0;
  }

  // Turns counts into the position, within its bucket, of each part's first slot; fills the per-bucket tables.
  void number(std::vector<int64_t> &next, int64_t parts) {
    counts_.resize(static_cast<size_t>(buckets_));
    before_.resize(static_cast<size_t>(buckets_));
    first_row_.resize(static_cast<size_t>(buckets_));
    limit_.assign(static_cast<size_t>(buckets_), INT64_MAX);
    int64_t before = 0;
    int64_t reserved_before = 0;
    for (int64_t b = 0; b < buckets_; ++b) {
      int64_t count = 0;
      for (int64_t part = 0; part < parts; ++part) {
        int64_t &entry = next[static_cast<size_t>(part * buckets_ + b)];
        count += std::exchange(entry, count);
      }
      const auto i = static_cast<size_t>(b);
      counts_[i] = count;
      before_[i] = before;
      before += count;
      const int64_t expert = b - 1;
      if (p_.reserved != nullptr) {
        first_row_[i] = std::min(reserved_before, p_.row_count);
        limit_[i] = b == 0 ? 0 : std::max<int64_t>(0, p_.reserved[expert]);
        reserved_before += limit_[i];
      } else if (p_.m_max > 0) {
        first_row_[i] = expert * p_.m_max;
        limit_[i] = b == 0 ? 0 : p_.m_max;
      } else {
        first_row_[i] = before_[i] - (p_.drop_negatives ? counts_[0] : 0);
      }
    }
  }

  void write_tables() const {
    const int64_t dropped = p_.drop_negatives ? counts_[0] : 0;
    if (p_.seg_indptr != nullptr) p_.seg_indptr[0] = 0;
    for (int64_t e = 0; e < p_.experts; ++e) {
      const auto i = static_cast<size_t>(e + 1);
      if (p_.seg_indptr != nullptr) p_.seg_indptr[e + 1] = before_[i] + counts_[i] - dropped;
      if (p_.masked_m != nullptr) p_.masked_m[e] = static_cast<int32_t>(std::min(counts_[i], limit_[i]));
      if (p_.expert_start_loc != nullptr) p_.expert_start_loc[e] = static_cast<int32_t>(first_row_[i]);
      if (p_.m_indices != nullptr) {
        const int64_t begin = std::min(p_.row_count, first_row_[i]);
        const int64_t end = std::min(p_.row_count, first_row_[i] + limit_[i]);
        std::fill(p_.m_indices + begin, p_.m_indices + end, static_cast<int32_t>(e));
      }
    }
  }

  void place(int64_t slot, int64_t position) {
    const int64_t b = bucket(slot);
    const auto i = static_cast<size_t>(b);
    int64_t row = first_row_[i] + position;
    if (position >= limit_[i] || row >= p_.row_count) {
      if (b != 0) overflows_.report(slot);
      row = -1;
    }
    store(p_.src2dst, p_.src2dst_int64, slot, row);
    if (p_.reorder_topk_ids == nullptr) return;
    int64_t at = before_[i] + position;
    if (p_.drop_negatives) at = b == 0 ? p_.slots - counts_[0] + position : at - counts_[0];
    store(p_.reorder_topk_ids, p_.topk_ids.is_int64, at, b - 1);
  }

  void raise() const {
    const auto name = [&](int param) { return p_.call->entry->op->params[param].name; };
    if (bad_ids_.any()) {
      bad_ids_.raise(name(p_.ids_param), p_.topk_ids[bad_ids_.first()], -1, p_.experts, p_.topk,
                     "The slot was treated as -1 and the rest computed");
    }
    if (!overflows_.any()) return;
    const int64_t first = overflows_.first();
    const int64_t id = p_.topk_ids[first];
    int64_t position = 0;
    for (int64_t i = 0; i < first; ++i) position += p_.topk_ids[i] == id;
    const auto i = static_cast<size_t>(id + 1);
    const int64_t limit = std::min(limit_[i], std::max<int64_t>(0, p_.row_count - first_row_[i]));
    overflows_.raise(name(p_.limit_param), position, 0, limit, p_.topk,
                     "Expert " + std::to_string(id) + " has no room for this slot, which got -1; raise the limit");
  }

  const Problem &p_;
  const int64_t buckets_;
  std::vector<int64_t> counts_, before_, first_row_, limit_;  // by bucket
  Offence bad_ids_, overflows_;
};

}  // namespace

void check_sizes(const Problem &p) {
  if (p.slots > int64_t{1} << 30) {
    fail(EPMOE_ERR_SHAPE, p.call->entry->op->params[p.ids_param].name, "at most 2^30 slots T*K",
         std::to_string(p.slots), "Split the call");
  }
  if (p.experts < 1 || p.experts > 1024) {
    fail(EPMOE_ERR_SHAPE, p.reserved != nullptr ? "num_recv_tokens_per_expert" : "seg_indptr", "1 to 1024 experts",
         std::to_string(p.experts));
  }
}

void run_cpu(const Problem &p) { Order(p).run(); }

}  // namespace epmoe::expert_order
