#include "core/stream.h"

#include <algorithm>
#include <cstring>

#if defined(__linux__)
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace epmoe {
namespace {

int64_t cache_bytes() {
#if defined(__linux__) && defined(_SC_LEVEL3_CACHE_SIZE)
  const int64_t told = sysconf(_SC_LEVEL3_CACHE_SIZE);
  if (told > 0) return told;
#endif
  return int64_t{32} << 20;
}

}  // namespace

bool exceeds_caches(int64_t nbytes) {
  static const int64_t size = cache_bytes();
  return nbytes > size / 2;
}

#if defined(__SSE2__)

void stream_copy(void *out, const void *in, int64_t nbytes) {
  auto *to = static_cast<char *>(out);
  const auto *from = static_cast<const char *>(in);
  const int64_t head = std::min<int64_t>(nbytes, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & 63);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + 64 <= nbytes; i += 64) {  // a line, which the processor sends off whole
    __m128i part[4];
    for (int k = 0; k < 4; ++k) part[k] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i) + k);
    for (int k = 0; k < 4; ++k) _mm_stream_si128(reinterpret_cast<__m128i *>(to + i) + k, part[k]);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(nbytes - i));
}

void stream_end() { _mm_sfence(); }

#else

void stream_copy(void *out, const void *in, int64_t nbytes) { std::memcpy(out, in, static_cast<size_t>(nbytes)); }
void stream_end() {}

#endif

}  // namespace epmoe
