#include "core/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "epmoe.h"

namespace epmoe {
namespace {

int default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

struct Job {
  const void *body;
  detail::Range range;
  int64_t count, grain, threads;
  std::atomic<int64_t> next{0};

  // Long ranges first, so that a thread mostly goes on where it was, and short ones last, so that all end together.
  void work() {
    for (int64_t begin = next.load(); begin < count;) {
      const int64_t length = std::max(grain, (count - begin) / (3 * threads));
      const int64_t end = std::min(count, begin + length);
      if (!next.compare_exchange_weak(begin, end)) continue;
      range(body, begin, end);
      begin = next.load();
    }
  }
};

// A kernel that packs threads onto few processors wakes helpers where the caller runs, to wait there until it is done.
class Elsewhere {
 public:
  // Keeps `threads` off the processor that this call is made on, within those that the caller may use.
  void keep(const std::vector<std::thread::native_handle_type> &threads) {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here == avoided_ || here < 0 || here >= CPU_SETSIZE) return;
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return;
    CPU_CLR(here, &set);
    if (CPU_COUNT(&set) == 0) return;
    for (const auto thread : threads) pthread_setaffinity_np(thread, sizeof set, &set);
    avoided_ = here;
#else
    (void)threads;
#endif
  }

 private:
  int avoided_ = -1;
};

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) {
      std::thread helper([this] { serve(); });
      helpers_.push_back(helper.native_handle());
      helper.detach();
    }
  }

  std::mutex &in_use() { return in_use_; }

  void run(Job &job) {
    elsewhere_.keep(helpers_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      busy_ = static_cast<int>(helpers_.size());
      ++generation_;
    }
    start_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    job_ = nullptr;
  }

 private:
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      Job *job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        start_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
      }
      job->work();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable start_, done_;
  Job *job_ = nullptr;
  std::vector<std::thread::native_handle_type> helpers_;
  Elsewhere elsewhere_;
  int busy_ = 0;
  uint64_t generation_ = 0;
};

std::atomic<int> requested{0};
std::atomic<Pool *> current{nullptr};
std::mutex making;

// Pools are never destroyed: their threads may still sleep in them while the process exits.
Pool *pool() {
  Pool *existing = current.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
  const std::lock_guard<std::mutex> lock(making);
  existing = current.load(std::memory_order_acquire);
  if (existing != nullptr) return existing;
#if !defined(_WIN32)
  // A forked child has the pool's memory but none of its threads: it makes its own on first use.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current.store(nullptr); });
  (void)registered;
#endif
  auto *made = new Pool(epmoe_cpu_threads());
  current.store(made, std::memory_order_release);
  return made;
}

}  // namespace

void detail::parallel_ranges(int64_t count, int64_t grain, const void *body, Range range) {
  if (count <= 0) return;
  if (grain < 1) grain = 1;
  const int threads = epmoe_cpu_threads();
  if (count <= grain || threads == 1) return range(body, 0, count);
  Pool *workers = pool();
  const std::unique_lock<std::mutex> lock(workers->in_use(), std::try_to_lock);
  if (!lock.owns_lock()) return range(body, 0, count);
  Job job{body, range, count, grain, threads, {}};
  workers->run(job);
}

}  // namespace epmoe

extern "C" void epmoe_set_cpu_threads(int32_t count) {
  const std::lock_guard<std::mutex> lock(epmoe::making);
  epmoe::requested.store(count > 0 ? count : 0);
  epmoe::current.store(nullptr);  // the old pool's threads sleep on; a resize is rare
}

extern "C" int32_t epmoe_cpu_threads(void) {
  const int wanted = epmoe::requested.load();
  if (wanted > 0) return wanted;
  static const int machine = epmoe::default_threads();
  return machine;
}
