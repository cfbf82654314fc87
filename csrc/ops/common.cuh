// What CUDA kernels of this library share: element types, 16-byte vectors with cache hints, index loads, launching.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "core/cuda.h"
#include "core/op.h"

namespace epmoe::gpu {

// Arithmetic of one activation dtype. `widen`/`narrow` convert to and from float32. Two 16-bit elements share a
// register as `Pair`, and `fma` rounds each lane once to the dtype.
template <typename T>
struct Element;

template <>
struct Element<float> {
  using Pair = float;
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
  static __device__ float mul(float a, float b) { return __fmul_rn(a, b); }
  static __device__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static __device__ Pair broadcast(float x) { return x; }
};

template <>
struct Element<__half> {
  using Pair = __half2;
  static __device__ float widen(__half x) { return __half2float(x); }
  static __device__ __half narrow(float x) { return __float2half_rn(x); }
  static __device__ float2 widen(__half2 x) { return __half22float2(x); }
  static __device__ __half2 narrow(float2 x) { return __float22half2_rn(x); }
  static __device__ __half mul(__half a, __half b) { return __hmul_rn(a, b); }
  static __device__ __half2 mul(__half2 a, __half2 b) { return __hmul2_rn(a, b); }
  static __device__ __half fma(__half a, __half b, __half c) { return __hfma(a, b, c); }
  static __device__ __half2 fma(__half2 a, __half2 b, __half2 c) { return __hfma2(a, b, c); }
  static __device__ Pair broadcast(__half x) { return __half2half2(x); }
};

template <>
struct Element<__nv_bfloat16> {
  using Pair = __nv_bfloat162;
  static __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
  // By the bits: of the conversion function nvcc makes one instruction more for the upper half.
  static __device__ float2 widen(__nv_bfloat162 x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  }
  static __device__ __nv_bfloat162 narrow(float2 x) { return __float22bfloat162_rn(x); }
  static __device__ __nv_bfloat16 mul(__nv_bfloat16 a, __nv_bfloat16 b) { return __hmul_rn(a, b); }
  static __device__ __nv_bfloat162 mul(__nv_bfloat162 a, __nv_bfloat162 b) { return __hmul2_rn(a, b); }
  static __device__ __nv_bfloat16 fma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) { return __hfma(a, b, c); }
  static __device__ __nv_bfloat162 fma(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
    return __hfma2(a, b, c);
  }
  static __device__ Pair broadcast(__nv_bfloat16 x) { return __bfloat162bfloat162(x); }
};

// N elements moved by one instruction: 16 bytes where alignment allows (N = 16 / sizeof(T)), one element otherwise.
template <typename T, int N>
struct Vector {
  uint32_t word[4];

  __device__ void widen(float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = __uint_as_float(word[i]);
      } else {
        const float2 pair = Element<T>::widen(as_pair(i));
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
  __device__ void narrow(const float (&in)[N]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4)
        word[i] = __float_as_uint(in[i]);
      else
        set_pair(i, Element<T>::narrow(make_float2(in[2 * i], in[2 * i + 1])));
    }
  }
  // this += row * weight, each lane rounded once to T.
  __device__ void add_rounded(const Vector &row, T weight) {
    const Pair factor = Element<T>::broadcast(weight);
#pragma unroll
    for (int i = 0; i < 4; ++i) set_pair(i, Element<T>::fma(row.as_pair(i), factor, as_pair(i)));
  }

 private:
  using Pair = typename Element<T>::Pair;
  __device__ Pair as_pair(int i) const {
    Pair pair;
    memcpy(&pair, &word[i], 4);
    return pair;
  }
  __device__ void set_pair(int i, Pair pair) { memcpy(&word[i], &pair, 4); }
};

template <typename T>
struct Vector<T, 1> {
  T value;
  __device__ void widen(float (&out)[1]) const { out[0] = Element<T>::widen(value); }
  __device__ void narrow(const float (&in)[1]) { value = Element<T>::narrow(in[0]); }
  __device__ void add_rounded(const Vector &row, T weight) { value = Element<T>::fma(row.value, weight, value); }
};

// How a kernel treats the caches. kStreaming: data larger than L2, each byte used once, so it should displace nothing.
// kCached: the rows may still sit in L2 from the GEMM that wrote them, and the output will be read soon.
enum class CachePolicy { kCached, kStreaming };

template <CachePolicy kPolicy, typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T *source) {
  Vector<T, N> vector;
  if constexpr (N == 1) {
    vector.value = *source;
  } else if constexpr (kPolicy == CachePolicy::kStreaming) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(vector.word[0]), "=r"(vector.word[1]), "=r"(vector.word[2]), "=r"(vector.word[3])
                 : "l"(source));
  } else {
    const uint4 bits = __ldg(reinterpret_cast<const uint4 *>(source));
    vector = {{bits.x, bits.y, bits.z, bits.w}};
  }
  return vector;
}

template <CachePolicy kPolicy, typename T, int N>
__device__ __forceinline__ void store(T *destination, const Vector<T, N> &vector) {
  if constexpr (N == 1) {
    *destination = vector.value;
  } else {
    const uint4 bits = make_uint4(vector.word[0], vector.word[1], vector.word[2], vector.word[3]);
    if constexpr (kPolicy == CachePolicy::kStreaming)
      __stcs(reinterpret_cast<uint4 *>(destination), bits);
    else
      *reinterpret_cast<uint4 *>(destination) = bits;
  }
}

// An element of an int32 or int64 tensor as it lies in memory. Loading comes apart from reading, so that a kernel can
// have all its loads under way before the first value is asked for. Absent tensors load nothing.
struct RawIndex {
  int32_t low = 0, high = 0;
};

__device__ __forceinline__ RawIndex load_raw(const void *data, bool is_int64, int64_t i) {
  const auto *words = static_cast<const int32_t *>(data);
  RawIndex raw;
  if (data != nullptr) raw.low = __ldg(words + (is_int64 ? 2 * i : i));
  if (data != nullptr && is_int64) raw.high = __ldg(words + 2 * i + 1);
  return raw;
}

__device__ __forceinline__ int64_t index_of(RawIndex raw, bool is_int64) {
  const int32_t high = is_int64 ? raw.high : raw.low >> 31;
  return static_cast<int64_t>(static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 |
                              static_cast<uint32_t>(raw.low));
}

__device__ __forceinline__ int64_t load_index(const void *data, bool is_int64, int64_t i) {
  return index_of(load_raw(data, is_int64, i), is_int64);
}

// Reports an index that was skipped; the first offender wins, later ones are dropped. A call, so that what hardly ever
// runs does not take up instruction cache: a small kernel's time is to a good part the fetching of its code.
static __device__ __noinline__ void report_index(cuda::StatusWord *word, int32_t op_index, int32_t param, int64_t token,
                                                 int64_t slot, int64_t value, int64_t begin, int64_t end) {
  if (atomicCAS(&word->claim, 0ull, 1ull) != 0ull) return;
  word->op_index = op_index;
  word->param = param;
  word->token = token;
  word->slot = slot;
  word->value = value;
  word->begin = begin;
  word->end = end;
  __threadfence_system();
}

constexpr int kMaxThreads = 128;  // of kernels that move rows: larger blocks lose a little at the end of a grid

// The block size, a multiple of a warp, that leaves the fewest threads without columns.
inline int threads_for(int64_t groups) {
  int best = kMaxThreads;
  int64_t least = INT64_MAX;
  for (const int threads : {128, 96, 64}) {
    const int64_t padded = (groups + threads - 1) / threads * threads;
    if (padded < least) {
      least = padded;
      best = threads;
    }
  }
  return best;
}

// Waits for what the stream was given before this kernel, which may still be running: the first step of every kernel
// that Kernel::launch() starts, before it touches global memory.
__device__ __forceinline__ void wait_for_earlier_work() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks come and wait, rather than when this kernel's have ended. For kernels of a few blocks:
// of larger ones, blocks that wait on an SM take more than their head start gives.
__device__ __forceinline__ void let_the_next_come() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

inline bool aligned16(const void *pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

constexpr size_t kMostShared = 96 * 1024;

// A kernel as launches name it. The runtime looks a function's address up at every launch; the handle that look-up
// gives is kept, which saves a good part of a microsecond.
class Kernel {
 public:
  explicit Kernel(const void *function) : function_(function) {}

  // Starts while the kernel before it ends, where the GPU can: wait_for_earlier_work() must be the kernel's first step.
  // Parameters must have the very types of the kernel's.
  template <typename... Parameters>
  void launch(const Call &call, dim3 grid, dim3 block, size_t shared, const Parameters &...parameters) {
    Attributes attributes;
    attributes.early(cuda::facts(call.device.device_id).cc_major >= 9);
    launch_with(attributes, call, grid, block, shared, parameters...);
  }

  // Likewise as one cluster of blocks, which may read each other's shared memory; compute capability 9.0 and later.
  template <typename... Parameters>
  void launch_cluster(const Call &call, unsigned blocks, dim3 block, size_t shared, const Parameters &...parameters) {
    Attributes attributes;
    attributes.early(true);
    attributes.cluster(blocks);
    launch_with(attributes, call, dim3(blocks), block, shared, parameters...);
  }

  // All blocks run at once and may wait for each other; no more than resident_blocks() an SM.
  template <typename... Parameters>
  void launch_cooperative(const Call &call, dim3 grid, dim3 block, size_t shared, const Parameters &...parameters) {
    Attributes attributes;
    attributes.together();
    launch_with(attributes, call, grid, block, shared, parameters...);
  }

  int resident_blocks(int32_t device_id, unsigned threads, size_t shared) {
    allow_shared(device_id, shared);
    int blocks = 0;
    cuda::expect_success(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function_, static_cast<int>(threads), shared),
        "asking for a kernel's occupancy");
    return blocks;
  }

 private:
  class Attributes {
   public:
    void early(bool possible) {
      if (possible) add(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
    }
    void cluster(unsigned blocks) {
      auto &value = add(cudaLaunchAttributeClusterDimension).clusterDim;
      value.x = blocks;
      value.y = value.z = 1;
    }
    void together() { add(cudaLaunchAttributeCooperative).cooperative = 1; }
    cudaLaunchAttribute *data() { return items_; }
    unsigned count() const { return count_; }

   private:
    cudaLaunchAttributeValue &add(cudaLaunchAttributeID id) {
      items_[count_].id = id;
      return items_[count_++].val;
    }
    cudaLaunchAttribute items_[2]{};
    unsigned count_ = 0;
  };

  template <typename... Parameters>
  void launch_with(Attributes &attributes, const Call &call, dim3 grid, dim3 block, size_t shared,
                   const Parameters &...parameters) {
    allow_shared(call.device.device_id, shared);
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = static_cast<cudaStream_t>(call.stream);
    config.attrs = attributes.data();
    config.numAttrs = attributes.count();
    void *pointers[] = {const_cast<Parameters *>(&parameters)...};
    cuda::expect_success(cudaLaunchKernelExC(&config, handle(), pointers), "launching a kernel");
  }

  // More shared memory than every GPU gives a block has to be asked for, once for each device. kMostShared is what
  // those of compute capability 8.0 and later have at least.
  void allow_shared(int32_t device_id, size_t shared) {
    if (shared <= 48 * 1024) return;
    const uint64_t bit = uint64_t{1} << device_id;
    if ((allowed_.load(std::memory_order_relaxed) & bit) != 0) return;
    cuda::expect_success(
        cudaFuncSetAttribute(function_, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kMostShared)),
        "asking for shared memory");
    allowed_.fetch_or(bit, std::memory_order_relaxed);
  }

  const void *handle() {
    cudaKernel_t kernel = kernel_.load(std::memory_order_relaxed);
    if (kernel == nullptr) {
      cuda::expect_success(cudaGetKernel(&kernel, function_), "finding a kernel");
      kernel_.store(kernel, std::memory_order_relaxed);
    }
    return reinterpret_cast<const void *>(kernel);
  }

  const void *function_;
  std::atomic<uint64_t> allowed_{0};  // a bit a device
  std::atomic<cudaKernel_t> kernel_{nullptr};
};

// The one Kernel of a __global__ function.
template <auto *kFunction>
Kernel &kernel_of() {
  static Kernel kernel(reinterpret_cast<const void *>(kFunction));
  return kernel;
}

}  // namespace epmoe::gpu
