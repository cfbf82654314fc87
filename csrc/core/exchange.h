// Tensors and streams of another framework, reached through its DLPack exchange table.
#pragma once

#include "epmoe.h"

namespace epmoe {

// Fills `out` with a view of the framework's tensor `object`; throws Failure naming `argument` when it has none.
void read_object(void *object, const char *argument, DLTensor *out);

// The framework's current stream of a CUDA device; throws Failure without a table.
void *foreign_stream(int32_t device_id);

}  // namespace epmoe
