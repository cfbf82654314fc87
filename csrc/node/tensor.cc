#include "node/tensor.h"

#include <cstring>

namespace epmoe::node {
namespace {

int64_t count_of(const std::vector<int64_t> &shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

std::vector<int64_t> shape_argument(const Napi::Value &value) {
  const auto array = value.As<Napi::Array>();
  std::vector<int64_t> shape(array.Length());
  for (uint32_t i = 0; i < array.Length(); ++i) shape[i] = array.Get(i).As<Napi::Number>().Int64Value();
  return shape;
}

DLDevice device_argument(const Napi::CallbackInfo &info, size_t index) {
  return {info[index].As<Napi::Number>().Int32Value(), info[index + 1].As<Napi::Number>().Int32Value()};
}

epmoe_dtype_info dtype_argument(const Napi::Value &value) {
  return *epmoe_dtype_at(value.As<Napi::Number>().Int32Value());
}

bool contiguous(const DLTensor &tensor) {
  int64_t expected = 1;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}

// (shape, dtype, deviceType, deviceId): sizes have been checked by the caller.
Napi::Value empty(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  std::vector<int64_t> shape = shape_argument(info[0]);
  const epmoe_dtype_info dtype = dtype_argument(info[1]);
  const auto nbytes = static_cast<size_t>(count_of(shape) * dtype.itemsize);
  auto storage = Storage::allocate(environment, device_argument(info, 2), nbytes);
  char *data = storage->data;
  return describe(environment, environment.insert(make_record(std::move(storage), data, dtype.dl, std::move(shape))));
}

// (arrayBuffer, byteOffset, shape, dtype)
Napi::Value from_buffer(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  auto storage = Storage::borrow(environment, info[0].As<Napi::ArrayBuffer>());
  char *data = storage->data + info[1].As<Napi::Number>().Int64Value();
  return describe(environment, environment.insert(make_record(std::move(storage), data, dtype_argument(info[3]).dl,
                                                              shape_argument(info[2]))));
}

// (handle, offset in elements, shape, dtype): a contiguous tensor over a part of a contiguous one.
Napi::Value view(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  TensorRecord &base = require_tensor(info, 0);
  char *data = static_cast<char *>(base.dl.data) + base.dl.byte_offset +
               info[1].As<Napi::Number>().Int64Value() * (base.dl.dtype.bits / 8);
  auto record = make_record(base.storage, data, dtype_argument(info[3]).dl, shape_argument(info[2]));
  record->foreign = base.foreign;
  return describe(environment, environment.insert(std::move(record)));
}

// (handle, whether typed arrays over it are to become empty)
Napi::Value dispose(const Napi::CallbackInfo &info) {
  const bool known =
      Environment::of(info.Env()).erase(info[0].As<Napi::Number>().DoubleValue(), info[1].As<Napi::Boolean>().Value());
  return Napi::Boolean::New(info.Env(), known);
}

// {buffer, byteOffset} of the tensor's elements: in the ArrayBuffer that JavaScript brought, or in one made over
// exactly the tensor, once for each tensor. The caller has made sure that the size is one this Node can make.
Napi::Value buffer(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  TensorRecord &record = require_tensor(info, 0);
  Storage &storage = *record.storage;
  char *data = static_cast<char *>(record.dl.data) + record.dl.byte_offset;
  const bool borrowed = storage.owner == Storage::Owner::kBuffer;
  napi_value buffer = nullptr;
  napi_ref reference = borrowed ? storage.buffer : record.buffer;
  if (reference != nullptr) napi_get_reference_value(env, reference, &buffer);
  if (buffer == nullptr) {
    auto *keep = new std::shared_ptr<Storage>(record.storage);
    const size_t nbytes = static_cast<size_t>(count_of(record.shape)) * (record.dl.dtype.bits / 8);
    const napi_status status = napi_create_external_arraybuffer(
        env, data, nbytes, [](napi_env, void *, void *hint) { delete static_cast<std::shared_ptr<Storage> *>(hint); },
        keep, &buffer);
    if (status != napi_ok) {
      // Node runs the finaliser of a buffer it failed to make, except where it makes none at all.
      if (status == napi_no_external_buffers_allowed) delete keep;
      Environment::of(env).raise("ERR_UNSUPPORTED_TENSOR", "data", "", "a runtime that allows external ArrayBuffers",
                                 "one that forbids them", "Copy with toHost() instead");
    }
    if (record.buffer != nullptr) napi_delete_reference(env, record.buffer);
    napi_create_reference(env, buffer, 0, &record.buffer);
  }
  Napi::Object result = Napi::Object::New(env);
  result["buffer"] = Napi::Value(env, buffer);
  result["byteOffset"] = Napi::Number::New(env, static_cast<double>(borrowed ? data - storage.data : 0));
  return result;
}

// (destination, source): both contiguous and of one size. Copies that touch the GPU go on the stream of the source's,
// or else the destination's, latest work, or on the one that is captured; it is returned as an address.
Napi::Value copy(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  TensorRecord &destination = require_tensor(info, 0);
  TensorRecord &source = require_tensor(info, 1);
  const bool to_gpu = destination.dl.device.device_type == kDLCUDA;
  const bool from_gpu = source.dl.device.device_type == kDLCUDA;
  StreamRef stream;
  if (from_gpu || to_gpu) {
    stream = environment.recording != nullptr ? environment.recording->stream
                                              : environment.home_stream(from_gpu ? source : destination);
  }
  // The host's side of a copy has no stream of its own, but a graph must keep its memory.
  const bool captured = stream.known() && environment.recording != nullptr;
  if (from_gpu || captured) environment.follow(source, stream);
  if (to_gpu || captured) environment.follow(destination, stream);
  const size_t nbytes = static_cast<size_t>(count_of(source.shape)) * (source.dl.dtype.bits / 8);
  environment.require(epmoe_copy(static_cast<char *>(destination.dl.data) + destination.dl.byte_offset,
                                 destination.dl.device, static_cast<char *>(source.dl.data) + source.dl.byte_offset,
                                 source.dl.device, nbytes, stream.address));
  // Freeing memory waits for its own GPU alone: let that one know of the copy.
  const int32_t device_id = destination.dl.device.device_id;
  if (to_gpu && stream.device_id != device_id) environment.follow(destination, environment.own_stream(device_id));
  return Napi::Number::New(info.Env(), static_cast<double>(reinterpret_cast<uintptr_t>(stream.address)));
}

Napi::Array dtypes(Napi::Env env) {
  Napi::Array list = Napi::Array::New(env);
  for (int32_t i = 0; epmoe_dtype_at(i) != nullptr; ++i) {
    Napi::Object entry = Napi::Object::New(env);
    entry["name"] = Napi::String::New(env, epmoe_dtype_at(i)->name);
    entry["itemsize"] = Napi::Number::New(env, epmoe_dtype_at(i)->itemsize);
    list[static_cast<uint32_t>(i)] = entry;
  }
  return list;
}

// Live tensors, and the bytes of the distinct storages under them, by device.
Napi::Value count(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  Environment &environment = Environment::of(env);
  environment.drain();
  Napi::Array result = Napi::Array::New(env);
  uint32_t i = 0;
  for (const auto &[device, live] : environment.live()) {
    Napi::Object entry = Napi::Object::New(env);
    entry["deviceType"] = Napi::Number::New(env, device.first);
    entry["deviceId"] = Napi::Number::New(env, device.second);
    entry["tensors"] = Napi::Number::New(env, static_cast<double>(live.tensors));
    entry["bytes"] = Napi::Number::New(env, static_cast<double>(live.bytes));
    result[i++] = entry;
  }
  return result;
}

void tell_external(const Napi::CallbackInfo &info) {
  Environment::of(info.Env()).tell_external(info[0].As<Napi::Number>().Int64Value());
}

}  // namespace

std::unique_ptr<TensorRecord> make_record(std::shared_ptr<Storage> storage, char *data, DLDataType dtype,
                                          std::vector<int64_t> shape, std::vector<int64_t> strides) {
  auto record = std::make_unique<TensorRecord>();
  record->shape = std::move(shape);
  record->strides = std::move(strides);
  if (record->strides.empty()) {
    record->strides.resize(record->shape.size());
    int64_t stride = 1;
    for (size_t i = record->shape.size(); i-- > 0; stride *= record->shape[i]) record->strides[i] = stride;
  }
  record->dl.data = data;
  record->dl.device = storage->device;
  record->dl.ndim = static_cast<int32_t>(record->shape.size());
  record->dl.dtype = dtype;
  record->dl.shape = record->shape.data();
  record->dl.strides = record->strides.data();
  record->storage = std::move(storage);
  return record;
}

std::unique_ptr<TensorRecord> make_record(std::shared_ptr<Storage> storage, const DLTensor &tensor) {
  std::vector<int64_t> shape(tensor.shape, tensor.shape + tensor.ndim);
  std::vector<int64_t> strides;
  if (tensor.strides != nullptr) strides.assign(tensor.strides, tensor.strides + tensor.ndim);
  storage->device = tensor.device;
  storage->data = static_cast<char *>(tensor.data) + tensor.byte_offset;
  storage->nbytes = static_cast<size_t>(count_of(shape)) * tensor.dtype.bits * tensor.dtype.lanes / 8;
  storage->report(storage->nbytes);
  char *data = storage->data;
  auto record = make_record(std::move(storage), data, tensor.dtype, std::move(shape), std::move(strides));
  record->foreign = true;
  return record;
}

Napi::Object describe(Environment &environment, double handle) {
  Napi::Env env = environment.env;
  const TensorRecord &record = *environment.find(handle);
  const auto numbers = [&](const std::vector<int64_t> &values) {
    Napi::Array array = Napi::Array::New(env, values.size());
    for (uint32_t i = 0; i < values.size(); ++i) array[i] = Napi::Number::New(env, static_cast<double>(values[i]));
    return array;
  };
  const auto address = reinterpret_cast<uintptr_t>(record.dl.data) + record.dl.byte_offset;
  Napi::Object result = Napi::Object::New(env);
  result["handle"] = Napi::Number::New(env, handle);
  result["shape"] = numbers(record.shape);
  result["strides"] = numbers(record.strides);
  result["dtype"] = Napi::Number::New(env, epmoe_dtype_of(record.dl.dtype));
  result["deviceType"] = Napi::Number::New(env, record.dl.device.device_type);
  result["deviceId"] = Napi::Number::New(env, record.dl.device.device_id);
  result["address"] = Napi::BigInt::New(env, static_cast<uint64_t>(address));
  result["nbytes"] = Napi::Number::New(env, static_cast<double>(count_of(record.shape) * (record.dl.dtype.bits / 8)));
  result["contiguous"] = Napi::Boolean::New(env, contiguous(record.dl));
  result["foreign"] = Napi::Boolean::New(env, record.foreign);
  return result;
}

TensorRecord &require_tensor(const Napi::CallbackInfo &info, size_t index) {
  Environment &environment = Environment::of(info.Env());
  TensorRecord *record = environment.find(info[index].As<Napi::Number>().DoubleValue());
  if (record == nullptr) {
    environment.raise("ERR_DISPOSED", "", "tensor", "a live tensor", "a disposed one", "Keep it until its last use");
  }
  return *record;
}

void export_tensors(Napi::Env env, Napi::Object exports) {
  Napi::Object tensor = Napi::Object::New(env);
  tensor["empty"] = Napi::Function::New(env, empty);
  tensor["fromBuffer"] = Napi::Function::New(env, from_buffer);
  tensor["view"] = Napi::Function::New(env, view);
  tensor["dispose"] = Napi::Function::New(env, dispose);
  tensor["buffer"] = Napi::Function::New(env, buffer);
  tensor["copy"] = Napi::Function::New(env, copy);
  tensor["tellExternal"] = Napi::Function::New(env, tell_external);
  tensor["count"] = Napi::Function::New(env, count);
  exports["tensor"] = tensor;
  exports["dtypes"] = dtypes(env);
}

}  // namespace epmoe::node
