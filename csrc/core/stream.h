// Writes that pass the caches by: of data that exceeds them, a line would only be read to be overwritten.
#pragma once

#include <cstdint>

namespace epmoe {

// Whether an output of so many bytes is better written past the caches.
bool exceeds_caches(int64_t nbytes);

// As memcpy, past the caches where the machine can. stream_end() comes before other threads may read.
void stream_copy(void *out, const void *in, int64_t nbytes);
void stream_end();

}  // namespace epmoe
