// Making and reading tensor records.
#pragma once

#include <memory>

#include "node/environment.h"

namespace epmoe::node {

// A record over `storage`, row-major contiguous unless strides are given.
std::unique_ptr<TensorRecord> make_record(std::shared_ptr<Storage> storage, char *data, DLDataType dtype,
                                          std::vector<int64_t> shape, std::vector<int64_t> strides = {});
// A record over a tensor that another framework described; fills in the storage's device, address and size.
std::unique_ptr<TensorRecord> make_record(std::shared_ptr<Storage> storage, const DLTensor &tensor);

// What JavaScript keeps of a tensor: {handle, shape, strides, dtype, deviceType, deviceId, address, nbytes,
// contiguous}.
Napi::Object describe(Environment &environment, double handle);

TensorRecord &require_tensor(const Napi::CallbackInfo &info, size_t index);

}  // namespace epmoe::node
