#include "node/environment.h"

#include <utility>

#include "node/python.h"

namespace epmoe::node {
namespace {

// A handle is a whole number below 2^53, which JavaScript holds exactly: the generation above 24 bits of index.
constexpr int kIndexBits = 24;
constexpr uint64_t kIndexSpan = uint64_t{1} << kIndexBits;

uint64_t index_of(double handle) { return static_cast<uint64_t>(handle) & (kIndexSpan - 1); }
uint64_t generation_of(double handle) { return static_cast<uint64_t>(handle) >> kIndexBits; }

}  // namespace

Environment::Environment(Napi::Env env) : env(env) {
  Napi::ArrayBuffer buffer = Napi::ArrayBuffer::New(env, sizeof(Frame));
  frame = static_cast<Frame *>(buffer.Data());
  frame_buffer = Napi::Persistent(buffer.As<Napi::ArrayBuffer>());
}

Environment::~Environment() {
  {
    const std::lock_guard<std::mutex> lock(outbox->mutex);
    outbox->closed = true;
  }
  slots_.clear();
}

double Environment::insert(std::unique_ptr<TensorRecord> record) {
  drain();
  uint32_t index = 0;
  if (free_.empty()) {
    index = static_cast<uint32_t>(slots_.size());
    if (index >= kIndexSpan)
      raise("ERR_OUT_OF_MEMORY", "", "", "fewer than 2^24 live tensors", "one more", "Dispose some");
    slots_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
  }
  record->handle = static_cast<double>(slots_[index].generation * kIndexSpan + index);
  slots_[index].record = std::move(record);
  return slots_[index].record->handle;
}

TensorRecord *Environment::find(double handle) {
  if (!(handle >= 0 && handle < 9007199254740992.0)) return nullptr;
  const uint64_t index = index_of(handle);
  if (index >= slots_.size() || slots_[index].generation != generation_of(handle)) return nullptr;
  return slots_[index].record.get();
}

bool Environment::erase(double handle, bool detach) {
  TensorRecord *record = find(handle);
  if (record == nullptr) return false;
  const auto index = static_cast<uint32_t>(index_of(handle));
  if (record->buffer != nullptr) {
    napi_value buffer = nullptr;
    napi_get_reference_value(env, record->buffer, &buffer);
    if (detach && buffer != nullptr) napi_detach_arraybuffer(env, buffer);
    napi_delete_reference(env, record->buffer);
  }
  slots_[index].record.reset();
  // A slot whose generations are used up is retired rather than reused.
  if (++slots_[index].generation < (1u << 28)) free_.push_back(index);
  drain();
  return true;
}

void Environment::follow(TensorRecord &record, StreamRef stream) {
  if (recording != nullptr) {
    if (record.foreign && !has_exchange()) {
      raise("ERR_CAPTURE", "Graph.capture", "tensor", "a torch that tells its stream in C, or tensors of epmoe's own",
            "a tensor of an older torch", "Update torch, or have torch.cuda.graph() capture");
    }
    recording->keep(record.storage);
    recording->handles.insert(record.handle);
    recording->foreign |= record.foreign;
    return;
  }
  StreamRef &last = record.storage->stream;
  if (last.known()) wait(stream, last);
  last = stream;
}

void Environment::wait(StreamRef stream, StreamRef awaited) {
  if (stream == awaited) return;
  require(epmoe_stream_wait(stream.device_id, stream.address, awaited.device_id, awaited.address));
}

StreamRef Environment::home_stream(const TensorRecord &record) {
  const int32_t device_id = record.dl.device.device_id;
  if (const StreamRef &last = record.storage->stream; last.device_id == device_id) return last;
  return record.foreign && has_exchange() ? foreign_stream(device_id) : own_stream(device_id);
}

StreamRef Environment::foreign_stream(int32_t device_id) {
  StreamRef stream{device_id};
  require(epmoe_stream_foreign(device_id, &stream.address));
  return stream;
}

StreamRef Environment::own_stream(int32_t device_id) {
  StreamRef stream{device_id};
  require(epmoe_stream_own(device_id, &stream.address));
  return stream;
}

void Environment::forget_stream(StreamRef stream) {
  require(epmoe_stream_synchronize(stream.device_id, stream.address));
  for (Slot &slot : slots_) {
    if (slot.record && slot.record->storage->stream == stream) slot.record->storage->stream = {};
  }
}

std::map<std::pair<int32_t, int32_t>, Environment::Count> Environment::live() const {
  std::map<std::pair<int32_t, int32_t>, Count> counts;
  std::set<const Storage *> storages;
  const auto add = [&](const Storage &storage, int64_t tensors) {
    const bool gpu = storage.device.device_type == kDLCUDA;
    Count &count = counts[gpu ? std::pair<int32_t, int32_t>{kDLCUDA, storage.device.device_id}
                              : std::pair<int32_t, int32_t>{kDLCPU, 0}];
    count.tensors += tensors;
    if (storages.insert(&storage).second) count.bytes += static_cast<int64_t>(storage.nbytes);
  };
  for (const Slot &slot : slots_) {
    if (slot.record) add(*slot.record->storage, 1);
  }
  for (const auto &[number, graph] : graphs) {
    for (const auto &[storage, keeper] : graph.used.storages) add(*storage, 0);
  }
  return counts;
}

void Environment::drain() {
  std::vector<napi_ref> references;
  {
    const std::lock_guard<std::mutex> lock(outbox->mutex);
    references.swap(outbox->references);
  }
  for (napi_ref reference : references) napi_delete_reference(env, reference);
}

void Environment::tell_external(int64_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(outbox->mutex);
    bytes += std::exchange(outbox->external_bytes, 0);
  }
  int64_t total = 0;
  if (bytes != 0) napi_adjust_external_memory(env, bytes, &total);
}

Napi::Object Environment::make_error(const char *code, const std::string &op, const std::string &argument,
                                     const std::string &expected, const std::string &received,
                                     const std::string &hint) {
  const auto text = [this](const std::string &value) { return Napi::String::New(env, value); };
  return error_maker.Call({text(code), text(op), text(argument), text(expected), text(received), text(hint)})
      .As<Napi::Object>();
}

Napi::Object Environment::make_error(const epmoe_error &error) {
  return make_error(epmoe_status_code(error.status), error.op, error.argument, error.expected, error.received,
                    error.hint);
}

void Environment::raise(const char *argument) {
  const epmoe_error *error = epmoe_last_error();
  throw Napi::Error(env, make_error(epmoe_status_code(error->status), error->op, argument ? argument : error->argument,
                                    error->expected, error->received, error->hint));
}

void Environment::raise(const char *code, const std::string &op, const std::string &argument,
                        const std::string &expected, const std::string &received, const std::string &hint) {
  throw Napi::Error(env, make_error(code, op, argument, expected, received, hint));
}

Storage::Storage(Environment &environment, Owner owner) : owner(owner), outbox_(environment.outbox) {}

std::shared_ptr<Storage> Storage::allocate(Environment &environment, DLDevice device, size_t nbytes) {
  void *data = nullptr;
  environment.require(epmoe_alloc(device, nbytes, &data));
  std::shared_ptr<Storage> storage(new Storage(environment, Owner::kLibrary));
  storage->device = device;
  storage->data = static_cast<char *>(data);
  storage->nbytes = nbytes;
  storage->report(storage->nbytes);
  return storage;
}

void Storage::report(size_t bytes) {
  const std::lock_guard<std::mutex> lock(outbox_->mutex);
  reported_ += static_cast<int64_t>(bytes);
  outbox_->external_bytes += static_cast<int64_t>(bytes);
}

std::shared_ptr<Storage> Storage::adopt(Environment &environment, DLManagedTensor *tensor) {
  std::shared_ptr<Storage> storage(new Storage(environment, Owner::kManaged));
  storage->managed_ = tensor;
  return storage;
}

std::shared_ptr<Storage> Storage::adopt(Environment &environment, DLManagedTensorVersioned *tensor) {
  std::shared_ptr<Storage> storage(new Storage(environment, Owner::kManagedVersioned));
  storage->managed_ = tensor;
  storage->read_only = (tensor->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
  return storage;
}

std::shared_ptr<Storage> Storage::borrow(Environment &environment, Napi::ArrayBuffer buffer) {
  std::shared_ptr<Storage> storage(new Storage(environment, Owner::kBuffer));
  storage->data = static_cast<char *>(buffer.Data());
  storage->nbytes = buffer.ByteLength();
  napi_create_reference(environment.env, buffer, 1, &storage->buffer);
  return storage;
}

Storage::~Storage() {
  switch (owner) {
    case Owner::kLibrary:
      epmoe_free(device, data);
      break;
    // After Python has finalised, its tensors are gone with it and their deleters must not run.
    case Owner::kManaged:
      if (auto *tensor = static_cast<DLManagedTensor *>(managed_); tensor->deleter && python_is_alive()) {
        tensor->deleter(tensor);
      }
      break;
    case Owner::kManagedVersioned:
      if (auto *tensor = static_cast<DLManagedTensorVersioned *>(managed_); tensor->deleter && python_is_alive()) {
        tensor->deleter(tensor);
      }
      break;
    case Owner::kBuffer:
      break;
  }
  const std::lock_guard<std::mutex> lock(outbox_->mutex);
  if (outbox_->closed) return;
  if (buffer != nullptr) outbox_->references.push_back(buffer);
  outbox_->external_bytes -= reported_;
}

}  // namespace epmoe::node
