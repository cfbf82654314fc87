// Writes that pass the caches by: of data that exceeds them, a line would only be read to be overwritten.
#pragma once

#include <cstdint>

namespace epmoe {

// Whether the output of an op that reads and writes so many bytes is better written past the caches. Up to the last
// cache's size, half of it more, a second call still finds enough of the first one's there.
bool exceeds_caches(int64_t nbytes);

// As memcpy, past the caches where the machine can. stream_end() comes before other threads may read.
void stream_copy(void *out, const void *in, int64_t nbytes);
// The same into several places, a line into each in turn: memory takes more of that than of one place after the other.
void stream_copies(char *const *outs, int64_t count, const char *in, int64_t nbytes);
void stream_end();

}  // namespace epmoe
