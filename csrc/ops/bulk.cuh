// Hopper's bulk copy engine: whole rows between global and shared memory, one instruction each. Addresses and sizes are
// multiples of 16 bytes. Nothing of this runs on older GPUs, where available() says so.
#pragma once

#include <cstdint>

#include "core/cuda.h"

namespace epmoe::gpu::bulk {

inline bool available(int32_t device_id) { return cuda::facts(device_id).cc_major >= 9; }

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Loads by one warp into one buffer, one after the other.
class Loader {
 public:
  // By all lanes of the warp, before wait_for_earlier_work().
  __device__ explicit Loader(uint64_t *barrier) : barrier_(shared_address(barrier)) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier_));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Loads and waits; all lanes of the warp call it.
  __device__ void load(void *shared, const void *source, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier_), "r"(bytes) : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(shared)),
                   "l"(source), "r"(bytes), "r"(barrier_)
                   : "memory");
    }
    uint32_t done = 0;
    while (done == 0) {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(barrier_), "r"(phase_)
                   : "memory");
    }
    phase_ ^= 1;
#endif
  }

 private:
  uint32_t barrier_;
  uint32_t phase_ = 0;
};

// Stores that leave L2 first: rows that together exceed it should not displace what is read again.
class Storer {
 public:
  __device__ Storer() {
#if __CUDA_ARCH__ >= 900
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy_));
#endif
  }

  __device__ void store(void *destination, const void *shared, uint32_t bytes) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(destination),
                 "r"(shared_address(shared)), "r"(bytes), "l"(policy_)
                 : "memory");
#endif
  }

  // Until the calling thread's stores have read shared memory, which may then be written, or given back by the block.
  static __device__ void wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
  }

 private:
  uint64_t policy_ = 0;
};

}  // namespace epmoe::gpu::bulk
