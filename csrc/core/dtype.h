// The dtypes epmoe knows, and how DLPack spells them.
#pragma once

#include <string>

#include "epmoe.h"

namespace epmoe {

constexpr uint32_t bit(int32_t dtype) { return 1u << dtype; }

int32_t dtype_of(DLDataType dl);         // -1 when unknown
std::string dtype_name(DLDataType dl);   // also of types epmoe does not take, for messages
std::string dtype_names(uint32_t mask);  // "float32, float16 or bfloat16"
int32_t itemsize(int32_t dtype);

}  // namespace epmoe
