#include "core/check.h"

#include <cmath>
#include <cstdio>
#include <string>

#include "core/error.h"
#include "core/exchange.h"

namespace epmoe {
namespace {

constexpr int64_t kUnbound = -1;

std::string shape_text(const DLTensor &tensor) {
  std::string text = "[";
  for (int32_t i = 0; i < tensor.ndim; ++i) text += (i ? ", " : "") + std::to_string(tensor.shape[i]);
  return text + "]";
}

std::string device_text(DLDevice device) {
  switch (device.device_type) {
    case kDLCPU:
      return "cpu";
    case kDLCUDAHost:
      return "cpu (pinned)";
    case kDLCUDA:
      return "cuda:" + std::to_string(device.device_id);
    case kDLCUDAManaged:
      return "cuda:" + std::to_string(device.device_id) + " (managed memory)";
    default:
      return "DLPack device type " + std::to_string(device.device_type);
  }
}

std::string number_text(double value) {
  char buffer[40];
  std::snprintf(buffer, sizeof buffer, value == std::floor(value) && std::fabs(value) < 1e16 ? "%.0f" : "%g", value);
  return buffer;
}

// Where the length of an axis was fixed, to be told when another argument disagrees.
struct Binding {
  int64_t length = kUnbound;
  int param = -1;
};

class Checker {
 public:
  Checker(const OpEntry &entry, const epmoe_value *values, Call *call, bool *foreign)
      : entry_(entry), params_(entry.op->params), values_(values), call_(call), foreign_(foreign) {}

  void run() {
    const int count = static_cast<int>(params_.size());
    for (int i = 0; i < count; ++i) {
      if (params_[i].kind == EPMOE_KIND_TENSOR)
        take_tensor(i);
      else
        take_scalar(i);
    }
    for (int i = 0; i < count; ++i) {
      if (!call_->present[i] || params_[i].kind != EPMOE_KIND_TENSOR) continue;
      check_dtype(i);
      check_device(i);
    }
    // Products of axes are compared once the axes themselves are known, whatever the order of the arguments.
    for (int i = 0; i < count; ++i) {
      if (is_tensor(i)) bind_shape(i);
    }
    for (int i = 0; i < count; ++i) {
      if (is_tensor(i)) check_products(i);
    }
    for (int i = 0; i < count; ++i) {
      if (is_tensor(i)) check_memory(i);
    }
    check_overlap();
    for (size_t axis = 0; axis < entry_.axis_names.size(); ++axis) {
      call_->axes[axis] = bindings_[axis].length == kUnbound ? 0 : bindings_[axis].length;
    }
  }

 private:
  bool is_tensor(int i) const { return params_[i].kind == EPMOE_KIND_TENSOR && call_->present[i]; }

  void take_tensor(int i) {
    const epmoe_param &param = params_[i];
    const epmoe_value &value = values_[i];
    call_->present[i] = true;
    switch (value.kind) {
      case EPMOE_VALUE_NONE:
        if (!param.optional) {
          fail(EPMOE_ERR_MISSING_ARGUMENT, param.name, "a tensor", "nothing", std::string("Pass ") + param.name);
        }
        call_->present[i] = false;
        return;
      case EPMOE_VALUE_FOREIGN:
        *foreign_ = true;
        [[fallthrough]];
      case EPMOE_VALUE_TENSOR:
        call_->tensors[i] = *value.as.tensor;
        break;
      case EPMOE_VALUE_OBJECT:
        *foreign_ = true;
        read_object(value.as.object, param.name, &call_->tensors[i]);
        break;
      default:
        fail(EPMOE_ERR_NOT_A_TENSOR, param.name, "a tensor", "a number", std::string("Pass a tensor as ") + param.name);
    }
    const DLTensor &tensor = call_->tensors[i];
    for (int32_t axis = 0; axis < tensor.ndim; ++axis) {
      if (tensor.shape[axis] < 0) {
        fail(EPMOE_ERR_SHAPE, param.name, "no negative size", shape_text(tensor), "Sizes count elements");
      }
    }
  }

  void take_scalar(int i) {
    const epmoe_param &param = params_[i];
    const epmoe_value &value = values_[i];
    call_->present[i] = value.kind != EPMOE_VALUE_NONE;
    double number = param.default_value;
    if (value.kind == EPMOE_VALUE_INT) {
      number = static_cast<double>(value.as.i);
    } else if (value.kind == EPMOE_VALUE_FLOAT) {
      number = value.as.f;
    } else if (value.kind != EPMOE_VALUE_NONE) {
      fail(EPMOE_ERR_VALUE, param.name, "a number", "a tensor", std::string("Pass a number as ") + param.name);
    }
    if (param.kind == EPMOE_KIND_FLOAT) {
      if (!std::isfinite(number) || number < param.min_value || number > param.max_value) {
        fail(EPMOE_ERR_VALUE, param.name, "a finite number that float32 can hold", number_text(number),
             "Leave it out for " + number_text(param.default_value));
      }
    } else if ((value.kind == EPMOE_VALUE_FLOAT && number != std::floor(number)) || number < param.min_value ||
               number > param.max_value) {
      const std::string what = param.kind == EPMOE_KIND_ENUM ? "the index of a choice" : "a whole number";
      fail(EPMOE_ERR_VALUE, param.name,
           what + " from " + number_text(param.min_value) + " to " + number_text(param.max_value), number_text(number),
           "Leave it out for " + number_text(param.default_value));
    }
    call_->reals[i] = number;
    call_->integers[i] = param.kind == EPMOE_KIND_FLOAT ? 0 : static_cast<int64_t>(number);
  }

  void check_dtype(int i) {
    const epmoe_param &param = params_[i];
    const DLTensor &tensor = call_->tensors[i];
    const int32_t dtype = dtype_of(tensor.dtype);
    call_->dtypes[i] = dtype;
    if (dtype >= 0 && (param.dtypes & bit(dtype))) return;
    const bool has_like = param.dtype_like >= 0 && call_->present[param.dtype_like];
    if (dtype >= 0 && has_like && dtype == dtype_of(call_->tensors[param.dtype_like].dtype)) return;
    uint32_t allowed = param.dtypes;
    std::string why;
    if (has_like) {
      const int32_t like = dtype_of(call_->tensors[param.dtype_like].dtype);
      if (like >= 0) allowed |= bit(like);
      why = std::string(" (as ") + params_[param.dtype_like].name + ")";
    }
    fail(EPMOE_ERR_DTYPE, param.name, dtype_names(allowed) + why, dtype_name(tensor.dtype),
         std::string("Convert ") + param.name + " before the call");
  }

  void check_device(int i) {
    const DLTensor &tensor = call_->tensors[i];
    DLDevice device = tensor.device;
    const bool host = device.device_type == kDLCPU || device.device_type == kDLCUDAHost;
    if (!host && device.device_type != kDLCUDA) {
      fail(EPMOE_ERR_DEVICE, params_[i].name, "a tensor on cpu or cuda", device_text(device), "Move it there first");
    }
    if (host) device = {kDLCPU, 0};
    if (first_device_ < 0) {
      first_device_ = i;
      call_->device = device;
    } else if (device.device_type != call_->device.device_type || device.device_id != call_->device.device_id) {
      fail(EPMOE_ERR_DEVICE, params_[i].name, device_text(call_->device) + " (as " + params_[first_device_].name + ")",
           device_text(tensor.device), "All tensors of a call live on one device");
    }
  }

  std::string pattern_text(int i) const {
    std::string text = params_[i].shape;
    std::string spaced;
    for (const char c : text) {
      if (c == ',')
        spaced += ", ";
      else if (c == '|')
        spaced += "] or [";
      else
        spaced += c;
    }
    text = "shape [" + spaced + "]";
    std::string known;
    for (size_t axis = 0; axis < entry_.axis_names.size(); ++axis) {
      const Binding &binding = bindings_[axis];
      if (binding.length == kUnbound ||
          std::string(params_[i].shape).find(entry_.axis_names[axis]) == std::string::npos)
        continue;
      known += (known.empty() ? " with " : ", ") + entry_.axis_names[axis] + " = " + std::to_string(binding.length) +
               " (from " + params_[binding.param].name + ")";
    }
    return text + known;
  }

  [[noreturn]] void wrong_shape(int i, epmoe_status status) const {
    fail(status, params_[i].name, pattern_text(i), shape_text(call_->tensors[i]),
         "Check which of the two has the wrong size, or reshape it");
  }

  void bind_shape(int i) {
    const DLTensor &tensor = call_->tensors[i];
    const ShapePattern *pattern = nullptr;
    for (const ShapePattern &candidate : entry_.shapes[i]) {
      const auto rank = static_cast<int32_t>(candidate.size());
      if (tensor.ndim == rank || (candidate[0].folds_leading && tensor.ndim > rank)) pattern = &candidate;
    }
    if (pattern == nullptr) wrong_shape(i, EPMOE_ERR_RANK);
    patterns_[i] = pattern;
    const int32_t folded = tensor.ndim - static_cast<int32_t>(pattern->size());
    for (size_t p = 0; p < pattern->size(); ++p) {
      int64_t length = tensor.shape[p + folded];
      if (p == 0) {
        for (int32_t axis = 0; axis < folded; ++axis) {
          if (__builtin_mul_overflow(length, tensor.shape[axis], &length)) wrong_shape(i, EPMOE_ERR_SHAPE);
        }
      }
      lengths_[i][p] = length;
      if (!(*pattern)[p].is_plain()) continue;
      Binding &binding = bindings_[(*pattern)[p].names[0]];
      if (binding.length == kUnbound)
        binding = {length, i};
      else if (binding.length != length)
        wrong_shape(i, EPMOE_ERR_SHAPE);
    }
  }

  // An axis that nothing else names is solved for, e.g. K from [T*K].
  void check_products(int i) {
    const ShapePattern &pattern = *patterns_[i];
    for (size_t p = 0; p < pattern.size(); ++p) {
      const AxisPattern &axis = pattern[p];
      if (axis.is_plain()) continue;
      const int64_t length = lengths_[i][p] - axis.addend;
      int64_t product = axis.factor;
      Binding *unknown = nullptr;
      for (const int16_t name : axis.names) {
        if (name < 0) continue;
        Binding &binding = bindings_[name];
        if (binding.length == kUnbound && unknown == nullptr)
          unknown = &binding;
        else if (binding.length == kUnbound || __builtin_mul_overflow(product, binding.length, &product))
          wrong_shape(i, EPMOE_ERR_SHAPE);
      }
      if (unknown != nullptr) *unknown = {length < 0 || product == 0 ? 0 : length / product, i};
      if (unknown != nullptr && __builtin_mul_overflow(product, unknown->length, &product)) {
        wrong_shape(i, EPMOE_ERR_SHAPE);
      }
      if (product != length) wrong_shape(i, EPMOE_ERR_SHAPE);
    }
  }

  void check_memory(int i) {
    const DLTensor &tensor = call_->tensors[i];
    int64_t count = 1;
    for (int32_t axis = 0; axis < tensor.ndim; ++axis) {
      if (__builtin_mul_overflow(count, tensor.shape[axis], &count)) wrong_shape(i, EPMOE_ERR_SHAPE);
    }
    const int64_t item = itemsize(call_->dtypes[i]);
    int64_t nbytes = 0;
    if (__builtin_mul_overflow(count, item, &nbytes)) wrong_shape(i, EPMOE_ERR_SHAPE);
    bytes_[i] = nbytes;
    if (count == 0) return;
    if (tensor.strides != nullptr) {
      int64_t expected = 1;
      for (int32_t axis = tensor.ndim - 1; axis >= 0; --axis) {
        if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) {
          std::string strides = "strides [";
          for (int32_t k = 0; k < tensor.ndim; ++k) strides += (k ? ", " : "") + std::to_string(tensor.strides[k]);
          fail(EPMOE_ERR_NOT_CONTIGUOUS, params_[i].name, "row-major contiguous memory",
               strides + "] for shape " + shape_text(tensor), "Call contiguous() on it first");
        }
        expected *= tensor.shape[axis];
      }
    }
    const auto address = reinterpret_cast<uintptr_t>(call_->data<char>(i));
    if (address == 0) fail(EPMOE_ERR_NOT_A_TENSOR, params_[i].name, "memory", "a null pointer", "Allocate it first");
    if ((address & static_cast<uintptr_t>(item - 1)) != 0) {  // item sizes are powers of two
      fail(EPMOE_ERR_MISALIGNED, params_[i].name, "an address that is a multiple of " + std::to_string(item) + " bytes",
           "remainder " + std::to_string(address & static_cast<uintptr_t>(item - 1)), "Copy it to fresh memory");
    }
  }

  // An output that shares memory with any other argument would be read after it was written.
  void check_overlap() const {
    for (size_t out = 0; out < params_.size(); ++out) {
      if (!is_tensor(static_cast<int>(out)) || params_[out].role != EPMOE_ROLE_OUT || bytes_[out] == 0) continue;
      const char *begin = call_->data<char>(static_cast<int>(out));
      for (size_t other = 0; other < params_.size(); ++other) {
        if (other == out || !is_tensor(static_cast<int>(other)) || bytes_[other] == 0) continue;
        const char *data = call_->data<char>(static_cast<int>(other));
        if (begin < data + bytes_[other] && data < begin + bytes_[out]) {
          fail(EPMOE_ERR_OVERLAP, params_[out].name,
               std::string("memory that shares no byte with ") + params_[other].name,
               begin == data ? "the same address" : "overlapping memory", "Give the op an output of its own");
        }
      }
    }
  }

  const OpEntry &entry_;
  const std::vector<epmoe_param> &params_;
  const epmoe_value *values_;
  Call *call_;
  bool *foreign_;
  int first_device_ = -1;
  Binding bindings_[kMaxAxes];
  const ShapePattern *patterns_[kMaxParams];
  int64_t lengths_[kMaxParams][kMaxAxes];
  int64_t bytes_[kMaxParams];
};

}  // namespace

void check_call(const OpEntry &entry, const epmoe_value *values, int32_t n_values, Call *call, bool *foreign) {
  call->entry = &entry;
  const auto expected = static_cast<int32_t>(entry.op->params.size());
  if (n_values != expected) {
    fail(EPMOE_ERR_VALUE, "", std::to_string(expected) + " values", std::to_string(n_values),
         "Pass one value for each parameter, EPMOE_VALUE_NONE for absent ones");
  }
  Checker(entry, values, call, foreign).run();
}

}  // namespace epmoe
