// Checks a call against an op's descriptor, for every caller alike.
#pragma once

#include "core/op.h"

namespace epmoe {

// Fills `call` from `values`; throws Failure on the first argument that does not fit. `foreign` tells whether any
// tensor belongs to the framework of the exchange table.
void check_call(const OpEntry &entry, const epmoe_value *values, int32_t n_values, Call *call, bool *foreign);

}  // namespace epmoe
