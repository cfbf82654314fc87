// Rows to their slots on the CPU: a row is converted once, or once an expert where scales differ, and copied.
#include "ops/scatter_rows.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "core/convert.h"
#include "core/error.h"
#include "core/simd.h"
#include "core/stream.h"
#include "core/threads.h"

namespace epmoe::scatter_rows {
namespace {

EPMOE_SIMD void multiply(float *out, const float *in, float factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}

class Scatter {
 public:
  explicit Scatter(const Problem &p) : p_(p), row_bytes_(p.hidden * itemsize(p.output_dtype)) {
    streams_ = exceeds_caches(p.tokens * (p.topk + 1) * row_bytes_);
  }

  void run() {
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, p_.hidden * (p_.topk + 1)));
    parallel_for(p_.tokens, grain, [&](int64_t begin, int64_t end) {
      Scratch scratch;
      for (int64_t token = begin; token < end; ++token) move(token, scratch);
      if (streams_) stream_end();
    });
    if (bad_rows_.any()) {
      bad_rows_.raise(name(p_.src2dst_param), p_.src2dst[bad_rows_.first()], p_.dst_start, p_.dst_start + p_.row_count,
                      p_.topk, "The slot was skipped and the rest moved");
    }
    if (bad_ids_.any()) {
      bad_ids_.raise(name(p_.ids_param), p_.topk_ids[bad_ids_.first()], p_.start_expert_id,
                     p_.start_expert_id + p_.scale_count, p_.topk,
                     "a1_scales has no entry for this expert; the slot was skipped and the rest moved");
    }
  }

 private:
  struct Slot {
    int64_t row;
    int64_t expert;  // local
  };
  struct Scratch {
    std::vector<Slot> slots;
    std::vector<char *> places;
    std::vector<float> wide, scaled, scales;
    std::vector<char> row;
  };

  const char *name(int param) const { return p_.call->entry->op->params[param].name; }

  void gather_slots(int64_t token, std::vector<Slot> &slots) {
    slots.clear();
    for (int64_t k = 0; k < p_.topk; ++k) {
      const int64_t flat = token * p_.topk + k;
      int64_t expert = 0;
      if (p_.topk_ids) {
        const int64_t id = p_.topk_ids[flat];
        if (id < p_.start_expert_id || id > p_.end_expert_id) continue;
        expert = id - p_.start_expert_id;
        if (p_.scales_by_expert() && expert >= p_.scale_count) {
          bad_ids_.report(flat);
          continue;
        }
      }
      const int64_t destination = p_.src2dst[flat];
      if (!p_.topk_ids && destination < 0) continue;
      const auto row = static_cast<uint64_t>(destination) - static_cast<uint64_t>(p_.dst_start);
      if (row >= static_cast<uint64_t>(p_.row_count)) {
        bad_rows_.report(flat);
        continue;
      }
      slots.push_back({static_cast<int64_t>(row), expert});
    }
  }

  void move(int64_t token, Scratch &s) {
    gather_slots(token, s.slots);
    if (s.slots.empty()) return;
    const char *source = static_cast<const char *>(p_.input) + token * p_.hidden * itemsize(p_.input_dtype);
    const char *row = source;
    const float *scales = p_.input_scales == nullptr ? nullptr : p_.input_scales + token * p_.groups;
    if (!p_.copies()) {
      const auto columns = static_cast<size_t>(p_.hidden);
      s.wide.resize(columns);
      s.scaled.resize(columns);
      s.row.resize(static_cast<size_t>(row_bytes_));
      widen_row(s.wide.data(), source, p_.input_dtype, p_.hidden);
      row = s.row.data();
      if (p_.quantization != quantize::kStatic) {
        quantise(s);
        scales = s.scales.data();
      } else if (!p_.scales_by_expert()) {
        convert(s, p_.a1_scales == nullptr ? nullptr : p_.a1_scales + token);
      }
    }
    s.places.clear();
    for (const Slot &slot : s.slots) {
      char *out = static_cast<char *>(p_.output) + slot.row * row_bytes_;
      if (p_.scales_by_expert()) {
        convert(s, p_.a1_scales + slot.expert);
        write(&out, 1, row);
      } else {
        s.places.push_back(out);
      }
      if (scales != nullptr) std::copy_n(scales, p_.groups, p_.output_scales + slot.row * p_.groups);
    }
    write(s.places.data(), static_cast<int64_t>(s.places.size()), row);
  }

  void write(char *const *places, int64_t count, const char *row) const {
    if (streams_) return stream_copies(places, count, row, row_bytes_);
    for (int64_t k = 0; k < count; ++k) std::memcpy(places[k], row, static_cast<size_t>(row_bytes_));
  }

  void convert(Scratch &s, const float *divisor) const {
    if (divisor == nullptr) return narrow_row(s.row.data(), s.wide.data(), p_.output_dtype, p_.hidden);
    if (p_.numerics == kTriton)
      multiply(s.scaled.data(), s.wide.data(), 1.0f / *divisor, p_.hidden);
    else
      divide_row(s.scaled.data(), s.wide.data(), *divisor, p_.hidden);
    narrow_row(s.row.data(), s.scaled.data(), p_.output_dtype, p_.hidden);
  }

  void quantise(Scratch &s) const {
    const int64_t size = p_.quantization == quantize::kToken ? p_.hidden : quantize::kGroupSize;
    s.scales.resize(static_cast<size_t>(p_.groups));
    quantize::divide_by_scales(s.scaled.data(), s.wide.data(), p_.hidden, size, p_.power_of_two, p_.numerics == kTriton,
                               s.scales.data());
    narrow_row(s.row.data(), s.scaled.data(), p_.output_dtype, p_.hidden);
  }

  const Problem &p_;
  const int64_t row_bytes_;
  bool streams_ = false;
  Offence bad_rows_, bad_ids_;
};

}  // namespace

void check_sizes(const Problem &p, int input_param, int output_param) {
  const auto name = [&](int param) { return p.call->entry->op->params[param].name; };
  if (p.topk > INT32_MAX || p.hidden > INT32_MAX) {
    fail(EPMOE_ERR_SHAPE, name(p.hidden > INT32_MAX ? input_param : p.src2dst_param), "sizes K and H below 2^31",
         std::to_string(std::max(p.topk, p.hidden)), "Split the call");
  }
  if (p.row_count >= 0xffffffffll) {
    fail(EPMOE_ERR_SHAPE, name(output_param), "fewer than 2^32 - 1 rows", std::to_string(p.row_count),
         "Split the call");
  }
}

void run_cpu(const Problem &p) {
  if (p.hidden > 0) Scatter(p).run();
}

}  // namespace epmoe::scatter_rows
