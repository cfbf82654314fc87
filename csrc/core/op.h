// What an op is to the library: its parameters as data, and functions that run a checked call.
//
// An op's own .cc declares one Op and registers it; an optional .cu registers the CUDA launch under the same name.
// Nothing else in the library names an op.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "epmoe.h"

namespace epmoe {

constexpr int kMaxParams = 24;
constexpr int kMaxAxes = 12;

// Parameters, read top to bottom as a signature.
epmoe_param tensor_in(const char *name, const char *shape, uint32_t dtypes, const char *doc, int32_t dtype_like = -1);
epmoe_param tensor_out(const char *name, const char *shape, uint32_t dtypes, const char *doc, int32_t dtype_like = -1);
epmoe_param integer(const char *name, double default_value, double min_value, double max_value, const char *doc);
epmoe_param real(const char *name, double default_value, const char *doc);
epmoe_param choice(const char *name, const char *const *choices, int32_t n_choices, const char *doc);
epmoe_param optional(epmoe_param param);

constexpr uint32_t kActivations = (1u << EPMOE_FLOAT32) | (1u << EPMOE_FLOAT16) | (1u << EPMOE_BFLOAT16);
constexpr uint32_t kFloat8 = 1u << EPMOE_FLOAT8_E4M3FN;
constexpr uint32_t kIndices = (1u << EPMOE_INT32) | (1u << EPMOE_INT64);
constexpr double kMaxInteger = 9007199254740992.0;  // 2^53: what a JavaScript number holds exactly

struct Op;
struct OpEntry;

// A call whose arguments have passed the checker.
struct Call {
  const OpEntry *entry = nullptr;
  DLTensor tensors[kMaxParams];  // valid where present[i]
  bool present[kMaxParams] = {};
  int32_t dtypes[kMaxParams];
  int64_t integers[kMaxParams];  // integers and enums
  double reals[kMaxParams];
  int64_t axes[kMaxAxes];  // lengths, in the order of Op::axes
  DLDevice device{kDLCPU, 0};
  void *stream = nullptr;

  bool has_dtype(int param, int32_t dtype) const { return present[param] && dtypes[param] == dtype; }

  // First element, or nullptr for an absent argument.
  template <typename T>
  T *data(int param) const {
    if (!present[param]) return nullptr;
    return reinterpret_cast<T *>(static_cast<char *>(tensors[param].data) + tensors[param].byte_offset);
  }
};

struct Op {
  const char *name;
  const char *doc;
  std::vector<const char *> axes;  // the names that shapes use; an op indexes Call::axes by this order
  std::vector<epmoe_param> params;
  void (*validate)(const Call &);  // what the descriptor cannot say; throws; may be nullptr
  void (*run_cpu)(const Call &);
};

using CudaLaunch = void (*)(const Call &);

struct RegisterOp {
  explicit RegisterOp(const Op *op);
};
struct RegisterCuda {
  RegisterCuda(const char *name, CudaLaunch launch);
};
// For an op whose kernel several ops share: registered from its .cc, where there is CUDA to register.
#ifdef EPMOE_WITH_CUDA
#define EPMOE_REGISTER_CUDA(name, launch) const ::epmoe::RegisterCuda kRegisteredCuda(name, launch)
#else
#define EPMOE_REGISTER_CUDA(name, launch) static_assert(true)
#endif

// One axis of a shape pattern: the product of up to two named axes and a number, plus a number.
struct AxisPattern {
  int16_t names[2] = {-1, -1};  // indices into OpEntry::axis_names
  int16_t factor = 1;
  int16_t addend = 0;
  bool folds_leading = false;

  bool is_plain() const { return names[1] < 0 && factor == 1 && addend == 0; }
};
using ShapePattern = std::vector<AxisPattern>;

// The registered form: patterns parsed once, CUDA launch found.
struct OpEntry {
  const Op *op = nullptr;
  epmoe_op_info info{};
  CudaLaunch run_cuda = nullptr;
  std::vector<std::string> axis_names;
  std::vector<std::vector<ShapePattern>> shapes;  // [param][alternative]
  int32_t index = 0;                              // position in the op table
};

const OpEntry *find_entry(const epmoe_op_info *info);  // nullptr when `info` is not one of ours
const OpEntry *entry_at(int32_t index);

}  // namespace epmoe
