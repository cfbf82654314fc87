// Index tensors as CPU kernels read them, and the report of an index that was skipped.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "core/error.h"
#include "core/op.h"

namespace epmoe {

// An int32 or int64 tensor; absent ones are false.
struct Indices {
  const void *data = nullptr;
  bool is_int64 = false;

  explicit operator bool() const { return data != nullptr; }
  int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t *>(data)[i] : static_cast<const int32_t *>(data)[i];
  }
};

inline Indices indices_of(const Call &call, int param) {
  return {call.data<const void>(param), call.has_dtype(param, EPMOE_INT64)};
}

inline void check_expert_range(int64_t start, int64_t end) {
  if (start <= end) return;
  fail(EPMOE_ERR_VALUE, "end_expert_id", "start_expert_id (" + std::to_string(start) + ") or more", std::to_string(end),
       "The range is inclusive at both ends");
}

// The first offender in slot order, whichever thread meets it.
class Offence {
 public:
  void report(int64_t flat_slot) {
    int64_t known = first_.load(std::memory_order_relaxed);
    while (flat_slot < known && !first_.compare_exchange_weak(known, flat_slot)) {
    }
  }
  bool any() const { return first() != INT64_MAX; }
  int64_t first() const { return first_.load(); }

  [[noreturn]] void raise(const char *argument, int64_t value, int64_t begin, int64_t end, int64_t topk,
                          const std::string &hint) const {
    fail(EPMOE_ERR_INDEX_OUT_OF_RANGE, argument,
         "an index in [" + std::to_string(begin) + ", " + std::to_string(end) + ")",
         std::to_string(value) + " at token " + std::to_string(first() / topk) + ", slot " +
             std::to_string(first() % topk),
         hint);
  }

 private:
  std::atomic<int64_t> first_{INT64_MAX};
};

}  // namespace epmoe
