// CPU ops split their work over one small pool of threads.
#pragma once

#include <cstdint>

namespace epmoe {

// Calls body(begin, end) on disjoint ranges that cover [0, count) and returns when all are done. Ranges are a share of
// what is left, but no shorter than `grain`. Runs on the calling thread alone when the work is small or the pool is
// busy with another call. `body` must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body &body);

namespace detail {
using Range = void (*)(const void *body, int64_t begin, int64_t end);
void parallel_ranges(int64_t count, int64_t grain, const void *body, Range range);
}  // namespace detail

template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body &body) {
  detail::parallel_ranges(count, grain, &body, [](const void *context, int64_t begin, int64_t end) {
    (*static_cast<const Body *>(context))(begin, end);
  });
}

}  // namespace epmoe
