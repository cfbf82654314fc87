#include "core/stream.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epmoe {
namespace {

// Of one last cache. sysconf() may tell all of a machine's together, of which a thread reaches a part.
int64_t cache_bytes() {
#if defined(__linux__)
  std::ifstream told("/sys/devices/system/cpu/cpu0/cache/index3/size");
  if (int64_t kilobytes = 0; told >> kilobytes && kilobytes > 0 && told.get() == 'K') return kilobytes << 10;
#if defined(_SC_LEVEL3_CACHE_SIZE)
  if (const int64_t all = sysconf(_SC_LEVEL3_CACHE_SIZE); all > 0) return all;
#endif
#endif
  return int64_t{32} << 20;
}

}  // namespace

bool exceeds_caches(int64_t nbytes) {
  static const int64_t size = cache_bytes();
  return nbytes > size + size / 2;
}

void stream_copy(void *out, const void *in, int64_t nbytes) {
  auto *to = static_cast<char *>(out);
  stream_copies(&to, 1, static_cast<const char *>(in), nbytes);
}

#if defined(__SSE2__)

void stream_copies(char *const *outs, int64_t count, const char *in, int64_t nbytes) {
  const auto misaligned = [](const char *out) { return reinterpret_cast<uintptr_t>(out) & 63; };
  for (int64_t k = 1; k < count; ++k) {
    if (misaligned(outs[k]) == misaligned(outs[0])) continue;
    for (k = 0; k < count; ++k) stream_copies(outs + k, 1, in, nbytes);
    return;
  }
  const int64_t head = std::min<int64_t>(nbytes, static_cast<int64_t>((64 - misaligned(outs[0])) & 63));
  const int64_t tail = head + (nbytes - head) / 64 * 64;
  for (int64_t i = head; i < tail; i += 64) {  // a line, which the processor sends off whole
    __m128i part[4];
    for (int j = 0; j < 4; ++j) part[j] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(in + i) + j);
    for (int64_t k = 0; k < count; ++k) {
      for (int j = 0; j < 4; ++j) _mm_stream_si128(reinterpret_cast<__m128i *>(outs[k] + i) + j, part[j]);
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    std::memcpy(outs[k], in, static_cast<size_t>(head));
    std::memcpy(outs[k] + tail, in + tail, static_cast<size_t>(nbytes - tail));
  }
}

void stream_end() { _mm_sfence(); }

#else

void stream_copies(char *const *outs, int64_t count, const char *in, int64_t nbytes) {
  for (int64_t k = 0; k < count; ++k) std::memcpy(outs[k], in, static_cast<size_t>(nbytes));
}
void stream_end() {}

#endif

}  // namespace epmoe
