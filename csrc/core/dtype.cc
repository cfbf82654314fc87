#include "core/dtype.h"

#include <cstring>
#include <vector>

namespace epmoe {
namespace {

constexpr epmoe_dtype_info kDtypes[EPMOE_DTYPE_COUNT] = {
    {"float32", {kDLFloat, 32, 1}, 4},   {"float16", {kDLFloat, 16, 1}, 2},
    {"bfloat16", {kDLBfloat, 16, 1}, 2}, {"float8_e4m3fn", {kDLFloat8_e4m3fn, 8, 1}, 1},
    {"int32", {kDLInt, 32, 1}, 4},       {"int64", {kDLInt, 64, 1}, 8},
    {"uint8", {kDLUInt, 8, 1}, 1},       {"float64", {kDLFloat, 64, 1}, 8},
};

}  // namespace

int32_t dtype_of(DLDataType dl) {
  // On the path of every call, where a search of the table would show.
  struct Lookup {
    int8_t by_code_and_bytes[32][9];
    Lookup() {
      std::memset(by_code_and_bytes, -1, sizeof by_code_and_bytes);
      for (int8_t i = 0; i < EPMOE_DTYPE_COUNT; ++i) {
        by_code_and_bytes[kDtypes[i].dl.code][kDtypes[i].dl.bits / 8] = i;
      }
    }
  };
  static const Lookup lookup;
  if (dl.lanes != 1 || dl.code >= 32 || dl.bits % 8 != 0 || dl.bits > 64) return -1;
  return lookup.by_code_and_bytes[dl.code][dl.bits / 8];
}

std::string dtype_name(DLDataType dl) {
  const int32_t dtype = dtype_of(dl);
  if (dtype >= 0) return kDtypes[dtype].name;
  std::string name;
  switch (dl.code) {
    case kDLInt:
      name = "int";
      break;
    case kDLUInt:
      name = "uint";
      break;
    case kDLFloat:
      name = "float";
      break;
    case kDLComplex:
      name = "complex";
      break;
    case kDLBool:
      return "bool";
    default:
      name = "DLPack type code " + std::to_string(dl.code) + " of bits ";
      break;
  }
  name += std::to_string(dl.bits);
  if (dl.lanes != 1) name += "x" + std::to_string(dl.lanes);
  return name;
}

std::string dtype_names(uint32_t mask) {
  std::vector<const char *> names;
  for (int32_t i = 0; i < EPMOE_DTYPE_COUNT; ++i) {
    if (mask & bit(i)) names.push_back(kDtypes[i].name);
  }
  std::string text;
  for (size_t i = 0; i < names.size(); ++i) {
    if (i > 0) text += i + 1 == names.size() ? " or " : ", ";
    text += names[i];
  }
  return text;
}

int32_t itemsize(int32_t dtype) { return kDtypes[dtype].itemsize; }

}  // namespace epmoe

extern "C" const epmoe_dtype_info *epmoe_dtype_at(int32_t dtype) {
  return dtype >= 0 && dtype < EPMOE_DTYPE_COUNT ? &epmoe::kDtypes[dtype] : nullptr;
}

extern "C" int32_t epmoe_dtype_of(DLDataType dl) { return epmoe::dtype_of(dl); }
