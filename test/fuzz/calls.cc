// libFuzzer over the whole contract: random calls of every op on the CPU, most of them nearly valid. Each tensor's
// memory is an allocation of exactly its size, so that the address sanitiser sees a step beyond either end.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "epmoe.h"

namespace {

using Data = FuzzedDataProvider;

std::vector<std::string> split(const std::string &text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

struct Memory {
  std::unique_ptr<char[]> bytes;
  std::vector<int64_t> shape, strides;
  DLTensor dl{};
};

class Call {
 public:
  Call(Data &data, const epmoe_op_info &op) : data_(data), op_(op) {}

  void run() {
    std::vector<epmoe_value> values(static_cast<size_t>(op_.n_params));
    memories_.resize(values.size());
    for (int32_t i = 0; i < op_.n_params; ++i) values[static_cast<size_t>(i)] = value(i);
    const epmoe_status status = epmoe_invoke(&op_, values.data(), op_.n_params, EPMOE_STREAM_AUTO, nullptr);
    if (status != EPMOE_ERR_INTERNAL) return;
    std::fprintf(stderr, "internal error of %s: %s\n", op_.name, epmoe_last_error()->message);
    std::abort();
  }

 private:
  bool rarely() { return data_.ConsumeIntegralInRange<int>(0, 23) == 0; }

  epmoe_value value(int32_t i) {
    const epmoe_param &param = op_.params[i];
    epmoe_value value{};
    value.kind = EPMOE_VALUE_NONE;
    if (rarely() || (param.optional && data_.ConsumeBool())) return value;
    switch (param.kind) {
      case EPMOE_KIND_TENSOR:
        value.kind = EPMOE_VALUE_TENSOR;
        value.as.tensor = tensor(i);
        return value;
      case EPMOE_KIND_FLOAT:
        value.kind = EPMOE_VALUE_FLOAT;
        value.as.f = data_.ConsumeFloatingPoint<double>();
        return value;
      case EPMOE_KIND_ENUM:
        value.kind = EPMOE_VALUE_INT;
        value.as.i = data_.ConsumeIntegralInRange<int64_t>(rarely() ? -1 : 0, param.n_choices - (rarely() ? 0 : 1));
        return value;
      default:
        value.kind = EPMOE_VALUE_INT;
        value.as.i = rarely() ? data_.ConsumeIntegral<int64_t>() : data_.ConsumeIntegralInRange<int64_t>(-2, 12);
        return value;
    }
  }

  int64_t length(const std::string &axis) {
    const auto known = axes_.find(axis);
    if (known != axes_.end()) return known->second;
    const int64_t most = axis == "H" || axis == "I" ? 300 : axis == "R" || axis == "M" ? 40 : 9;
    return axes_[axis] = data_.ConsumeIntegralInRange<int64_t>(0, most);
  }

  // "T*K", "2*I", "E+1" and plain names.
  int64_t evaluate(const std::string &text) {
    const std::vector<std::string> terms = split(text, '+');
    int64_t product = 1;
    for (const std::string &factor : split(terms[0], '*')) {
      product *= std::isdigit(static_cast<unsigned char>(factor[0])) ? std::atoll(factor.c_str()) : length(factor);
    }
    return product + (terms.size() > 1 ? std::atoll(terms[1].c_str()) : 0);
  }

  const DLTensor *tensor(int32_t i) {
    const epmoe_param &param = op_.params[i];
    Memory &memory = memories_[static_cast<size_t>(i)];
    const std::vector<std::string> alternatives = split(param.shape, '|');
    const size_t chosen = data_.ConsumeIntegralInRange<size_t>(0, alternatives.size() - 1);
    for (std::string axis : split(alternatives[chosen], ',')) {
      const bool folds = axis.rfind("...", 0) == 0;
      const int64_t size = evaluate(folds ? axis.substr(3) : axis);
      if (folds && size % 2 == 0 && data_.ConsumeBool()) {
        memory.shape.push_back(2);
        memory.shape.push_back(size / 2);
      } else {
        memory.shape.push_back(size);
      }
    }
    if (rarely()) memory.shape.back() += data_.ConsumeIntegralInRange<int64_t>(-1, 1);
    if (rarely()) memory.shape.push_back(1);
    const int32_t dtype = dtype_of(param);
    const epmoe_dtype_info &info = *epmoe_dtype_at(dtype);
    int64_t count = 1;
    for (int64_t &size : memory.shape) count *= size = std::max<int64_t>(0, size);
    const size_t nbytes = static_cast<size_t>(count) * static_cast<size_t>(info.itemsize);
    memory.dl.dtype = info.dl;
    memory.dl.device = {kDLCPU, 0};
    memory.dl.ndim = static_cast<int32_t>(memory.shape.size());
    memory.dl.shape = memory.shape.data();
    if (i > 0 && rarely() && memories_[static_cast<size_t>(i - 1)].bytes) {
      memory.dl.data = nullptr;  // no memory at all, which is refused unless there are no elements
      return &memory.dl;
    }
    memory.bytes.reset(new char[nbytes]);
    fill(memory.bytes.get(), nbytes, dtype);
    memory.dl.data = nbytes == 0 ? nullptr : memory.bytes.get();
    if (rarely()) {  // strides that are those of a contiguous tensor, or not
      memory.strides.resize(memory.shape.size());
      int64_t stride = 1;
      for (size_t axis = memory.shape.size(); axis-- > 0; stride *= memory.shape[axis]) memory.strides[axis] = stride;
      if (rarely()) memory.strides[0] += 1;
      memory.dl.strides = memory.strides.data();
    }
    return &memory.dl;
  }

  int32_t dtype_of(const epmoe_param &param) {
    if (rarely()) return data_.ConsumeIntegralInRange<int32_t>(0, EPMOE_DTYPE_COUNT - 1);
    std::vector<int32_t> allowed;
    for (int32_t dtype = 0; dtype < EPMOE_DTYPE_COUNT; ++dtype) {
      if (param.dtypes & (1u << dtype)) allowed.push_back(dtype);
    }
    if (param.dtype_like >= 0 && memories_[static_cast<size_t>(param.dtype_like)].dl.shape != nullptr) {
      allowed.push_back(epmoe_dtype_of(memories_[static_cast<size_t>(param.dtype_like)].dl.dtype));
    }
    return allowed.empty() ? 0 : allowed[data_.ConsumeIntegralInRange<size_t>(0, allowed.size() - 1)];
  }

  // Indices are small, some of them wrong; other elements are whatever bits come.
  void fill(char *bytes, size_t nbytes, int32_t dtype) {
    const bool whole = dtype == EPMOE_INT32 || dtype == EPMOE_INT64;
    if (!whole) {
      const std::vector<char> some = data_.ConsumeBytes<char>(std::min<size_t>(nbytes, 64));
      for (size_t i = 0; i < nbytes; ++i) bytes[i] = some.empty() ? static_cast<char>(0x3f) : some[i % some.size()];
      return;
    }
    const size_t each = dtype == EPMOE_INT32 ? 4 : 8;
    for (size_t i = 0; i < nbytes / each; ++i) {
      const int64_t index = rarely() ? data_.ConsumeIntegral<int64_t>() : data_.ConsumeIntegralInRange<int64_t>(-2, 12);
      std::memcpy(bytes + i * each, &index, each);
    }
  }

  Data &data_;
  const epmoe_op_info &op_;
  std::map<std::string, int64_t> axes_;
  std::vector<Memory> memories_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
  static const bool once = (epmoe_set_cpu_threads(1), true);
  (void)once;
  Data data(bytes, size);
  const int32_t op = data.ConsumeIntegralInRange<int32_t>(0, epmoe_op_count() - 1);
  Call(data, *epmoe_op_at(op)).run();
  return 0;
}
