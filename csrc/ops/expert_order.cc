// The order of slots by expert on the CPU: each part of the slots is counted, then placed where the counts say.
#include "ops/expert_order.h"

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/threads.h"

namespace epmoe::expert_order {
namespace {

constexpr int64_t kPart = 65536;  // slots that are worth a thread

template <typename Id, typename Row>
class Order {
 public:
  explicit Order(const Problem &p)
      : p_(p),
        ids_(static_cast<const Id *>(p.topk_ids.data)),
        src2dst_(static_cast<Row *>(p.src2dst)),
        reorder_topk_ids_(static_cast<Id *>(p.reorder_topk_ids)),
        experts_(static_cast<uint64_t>(p.experts)),
        buckets_(experts_ + 1) {}

  void run() {
    const int64_t parts = std::clamp<int64_t>(p_.slots / kPart, 1, epmoe_cpu_threads());
    const int64_t each = (p_.slots + parts - 1) / parts;
    std::vector<int64_t> next(static_cast<size_t>(parts) * buckets_);  // [part][bucket]: counts, then rows
    const auto for_parts = [&](const auto &body) {
      parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          body(std::min(p_.slots, part * each), std::min(p_.slots, (part + 1) * each),
               next.data() + static_cast<size_t>(part) * buckets_);
        }
      });
    };
    for_parts([&](int64_t from, int64_t to, int64_t *counts) { count(from, to, counts); });
    number(next, parts);
    write_tables();
    for_parts([&](int64_t from, int64_t to, int64_t *rows) {
      place(from, to, rows);
      if (reorder_topk_ids_ != nullptr) write_experts(from, to);
    });
    raise();
  }

 private:
  // 0 for -1, e + 1 for expert e; more than experts_ for what is out of range, which counts as -1.
  uint64_t bucket(int64_t slot) const { return static_cast<uint64_t>(static_cast<int64_t>(ids_[slot])) + 1; }

  void count(int64_t from, int64_t to, int64_t *counts) {
    for (int64_t i = from; i < to; ++i) {
      uint64_t b = bucket(i);
      if (b > experts_) {
        bad_ids_.report(i);
        b = 0;
      }
      ++counts[b];
    }
  }

  // Turns counts into the row of each part's first slot of a bucket; fills the per-bucket tables.
  void number(std::vector<int64_t> &next, int64_t parts) {
    counts_.resize(buckets_);
    before_.resize(buckets_);
    first_row_.resize(buckets_);
    limit_.assign(buckets_, INT64_MAX);
    end_row_.resize(buckets_);
    int64_t before = 0;
    int64_t reserved_before = 0;
    for (size_t b = 0; b < buckets_; ++b) {
      for (int64_t part = 0; part < parts; ++part) {
        int64_t &entry = next[static_cast<size_t>(part) * buckets_ + b];
        counts_[b] += std::exchange(entry, counts_[b]);
      }
      before_[b] = before;
      before += counts_[b];
      const int64_t expert = static_cast<int64_t>(b) - 1;
      if (p_.reserved != nullptr) {
        first_row_[b] = std::min(reserved_before, p_.row_count);
        limit_[b] = b == 0 ? 0 : std::max<int64_t>(0, p_.reserved[expert]);
        reserved_before += limit_[b];
      } else if (p_.m_max > 0) {
        first_row_[b] = expert * p_.m_max;
        limit_[b] = b == 0 ? 0 : p_.m_max;
      } else {
        first_row_[b] = before_[b] - (p_.drop_negatives ? counts_[0] : 0);
      }
      end_row_[b] = limit_[b] == INT64_MAX ? p_.row_count : std::min(p_.row_count, first_row_[b] + limit_[b]);
      for (int64_t part = 0; part < parts; ++part) next[static_cast<size_t>(part) * buckets_ + b] += first_row_[b];
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

  void place(int64_t from, int64_t to, int64_t *rows) {
    for (int64_t i = from; i < to; ++i) {
      const uint64_t b = bucket(i) <= experts_ ? bucket(i) : 0;
      const int64_t row = rows[b]++;
      const bool beyond = row >= end_row_[b];
      if (beyond & (b != 0)) overflows_.report(i);  // as one branch, which is never taken; slots of -1 are many
      src2dst_[i] = static_cast<Row>(beyond ? -1 : row);
    }
  }

  // The experts of rows [from, to): runs, since rows are in order of expert.
  void write_experts(int64_t from, int64_t to) const {
    const int64_t dropped = p_.drop_negatives ? counts_[0] : 0;
    for (size_t b = 0; b < buckets_; ++b) {
      const int64_t first = b == 0 && p_.drop_negatives ? p_.slots - dropped : before_[b] - dropped;
      const int64_t begin = std::max(from, first);
      const int64_t end = std::min(to, first + counts_[b]);
      if (begin < end) std::fill(reorder_topk_ids_ + begin, reorder_topk_ids_ + end, static_cast<Id>(b) - 1);
    }
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
  const Id *const ids_;
  Row *const src2dst_;
  Id *const reorder_topk_ids_;
  const uint64_t experts_;
  const size_t buckets_;
  std::vector<int64_t> counts_, before_, first_row_, limit_, end_row_;  // by bucket
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

void run_cpu(const Problem &p) {
  if (p.topk_ids.is_int64)
    p.src2dst_int64 ? Order<int64_t, int64_t>(p).run() : Order<int64_t, int32_t>(p).run();
  else
    p.src2dst_int64 ? Order<int32_t, int64_t>(p).run() : Order<int32_t, int32_t>(p).run();
}

}  // namespace epmoe::expert_order
