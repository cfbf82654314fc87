#include "node/python.h"

#include <cstring>
#include <memory>

#include "node/environment.h"
#include "node/tensor.h"

namespace epmoe::node {
namespace {

enum Name { kRequiresGrad, kIsNeg, kIsSparse, kIsQuantized, kIsMeta, kLayout };

// One interpreter a process, so one for all environments.
struct Torch {
  PyObject *tensor_type = nullptr;  // torch.Tensor
  PyObject *inbox = nullptr;        // a list of the bridge's, by which new objects reach JavaScript
  PyObject *names[6] = {};
  const DLPackExchangeAPI *exchange = nullptr;
};
Torch torch;

constexpr const char *kImport = "Tensor.fromTorch";

PyObject *object_argument(const Napi::Value &value) {
  return reinterpret_cast<PyObject *>(static_cast<uintptr_t>(value.As<Napi::Number>().DoubleValue()));
}

// The truth of a new reference, which is given up; a failure is false, and its error cleared.
bool take_truth(PyObject *value) {
  if (value == nullptr) {
    py.Err_Clear();
    return false;
  }
  const bool truth = py.Object_IsTrue(value) == 1;
  py.DecRef(value);
  return truth;
}

bool truth_of_attribute(PyObject *object, Name name) {
  return take_truth(py.Object_GetAttr(object, torch.names[name]));
}

bool truth_of_method(PyObject *object, Name name) {
  PyObject *method = py.Object_GetAttr(object, torch.names[name]);
  PyObject *value = method ? py.Object_CallObject(method, nullptr) : nullptr;
  if (method) py.DecRef(method);
  return take_truth(value);
}

bool is_tensor(PyObject *object) {
  PyObject *type = py.Object_Type(object);
  const bool yes = type != nullptr && py.Type_IsSubtype(type, torch.tensor_type) != 0;
  if (type != nullptr) py.DecRef(type);
  return yes;
}

// Called once the interpreter runs: (torch.Tensor, its exchange capsule or 0, the inbox), as addresses.
void attach(const Napi::CallbackInfo &info) {
  const Gil gil;
  const char *texts[] = {"requires_grad", "is_neg", "is_sparse", "is_quantized", "is_meta", "layout"};
  for (size_t i = 0; i < std::size(texts); ++i) torch.names[i] = py.Unicode_InternFromString(texts[i]);
  torch.tensor_type = object_argument(info[0]);
  torch.inbox = object_argument(info[2]);
  py.IncRef(torch.tensor_type);
  py.IncRef(torch.inbox);
  PyObject *capsule = object_argument(info[1]);
  if (capsule == nullptr) return;
  const auto *api = static_cast<const DLPackExchangeAPI *>(py.Capsule_GetPointer(capsule, "dlpack_exchange_api"));
  py.Err_Clear();
  if (api != nullptr && epmoe_set_exchange(api) == EPMOE_OK) torch.exchange = api;
}

[[noreturn]] void raise_unsupported(Environment &environment, PyObject *object) {
  py.Err_Clear();
  environment.raise("ERR_UNSUPPORTED_TENSOR", kImport, "object", "a dense tensor with memory of its own",
                    name_unsupported(object), "Make it dense first");
}

// Work that produced the tensor was launched on the framework's current stream; later work must follow it.
template <typename Managed>
Napi::Value adopt(Environment &environment, Managed *managed) {
  auto record = make_record(Storage::adopt(environment, managed), managed->dl_tensor);
  if (epmoe_dtype_of(record->dl.dtype) < 0) {
    environment.raise("ERR_DTYPE", kImport, "object", "a dtype that epmoe has", "another, e.g. bool or complex",
                      "Convert it with to() first");
  }
  if (record->dl.device.device_type == kDLCUDA && has_exchange()) {
    record->storage->stream = environment.foreign_stream(record->dl.device.device_id);
  }
  return describe(environment, environment.insert(std::move(record)));
}

void require_importable(Environment &environment, PyObject *object) {
  if (const Refusal refusal = refuse_object(object); refusal.code != nullptr) {
    environment.raise(refusal.code, kImport, "object", "a dense torch.Tensor", refusal.received, refusal.hint);
  }
}

// (address): throws unless the Python object is a tensor that may be imported, by whichever protocol.
void check(const Napi::CallbackInfo &info) {
  const Gil gil;
  require_importable(Environment::of(info.Env()), object_argument(info[0]));
}

// (address of a torch.Tensor) by the exchange table.
Napi::Value from_object(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  const Gil gil;
  PyObject *object = object_argument(info[0]);
  require_importable(environment, object);
  DLManagedTensorVersioned *managed = nullptr;
  if (torch.exchange->managed_tensor_from_py_object_no_sync(object, &managed) != 0)
    raise_unsupported(environment, object);
  return adopt(environment, managed);
}

// (address of a DLPack capsule): takes the tensor over, as the protocol asks of a consumer.
Napi::Value from_capsule(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  const Gil gil;
  PyObject *capsule = object_argument(info[0]);
  if (py.Capsule_IsValid(capsule, "dltensor_versioned")) {
    auto *managed = static_cast<DLManagedTensorVersioned *>(py.Capsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->version.major != DLPACK_ABI_MAJOR) {
      environment.raise("ERR_UNSUPPORTED_TENSOR", kImport, "object", "DLPack 1", "another major version",
                        "Update epmoe");
    }
    py.Capsule_SetName(capsule, "used_dltensor_versioned");
    return adopt(environment, managed);
  }
  if (py.Capsule_IsValid(capsule, "dltensor")) {
    auto *managed = static_cast<DLManagedTensor *>(py.Capsule_GetPointer(capsule, "dltensor"));
    py.Capsule_SetName(capsule, "used_dltensor");
    return adopt(environment, managed);
  }
  py.Err_Clear();
  environment.raise("ERR_NOT_A_TENSOR", kImport, "object", "a fresh DLPack capsule",
                    "something else, or a used capsule", "Take a new one from __dlpack__()");
}

// An exported tensor keeps the storage alive for as long as its consumer does.
struct Exported {
  std::shared_ptr<Storage> storage;
  std::vector<int64_t> shape, strides;
};

template <typename Managed>
Managed *export_tensor(const TensorRecord &record) {
  auto *exported = new Exported{record.storage, record.shape, record.strides};
  auto *managed = new Managed{};
  managed->dl_tensor = record.dl;
  managed->dl_tensor.shape = exported->shape.data();
  managed->dl_tensor.strides = exported->strides.data();
  managed->manager_ctx = exported;
  managed->deleter = [](Managed *self) {
    delete static_cast<Exported *>(self->manager_ctx);
    delete self;
  };
  return managed;
}

DLManagedTensorVersioned *export_versioned(const TensorRecord &record) {
  auto *managed = export_tensor<DLManagedTensorVersioned>(record);
  managed->version = {DLPACK_ABI_MAJOR, 0};
  managed->flags = record.storage->read_only ? DLPACK_FLAG_BITMASK_READ_ONLY : 0;
  return managed;
}

void put_in_inbox(PyObject *object) {
  py.List_Append(torch.inbox, object);
  py.DecRef(object);
}

// Makes the framework's current stream wait for the work on a tensor that is about to be handed to it; where the
// framework cannot be asked for its stream, the work itself is waited for.
void follow_framework(Environment &environment, TensorRecord &record) {
  if (record.dl.device.device_type != kDLCUDA) return;
  const int32_t device_id = record.dl.device.device_id;
  if (has_exchange()) return environment.follow(record, environment.foreign_stream(device_id));
  environment.require(epmoe_stream_synchronize(device_id, environment.home_stream(record).address));
}

// (handle): leaves a torch.Tensor over the same memory in the inbox, by the exchange table.
void to_object(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  const Gil gil;
  TensorRecord &record = require_tensor(info, 0);
  follow_framework(environment, record);
  DLManagedTensorVersioned *managed = export_versioned(record);
  void *object = nullptr;
  if (torch.exchange->managed_tensor_to_py_object_no_sync(managed, &object) != 0) {
    py.Err_Clear();
    environment.raise("ERR_UNSUPPORTED_TENSOR", "toTorch", "tensor", "a tensor that torch can view",
                      "one that it refuses", "Copy it to a supported device or dtype first");
  }
  put_in_inbox(object);
}

// (handle): leaves an unversioned DLPack capsule in the inbox, which every consumer understands.
void to_capsule(const Napi::CallbackInfo &info) {
  TensorRecord &record = require_tensor(info, 0);
  follow_framework(Environment::of(info.Env()), record);
  const Gil gil;
  auto *managed = export_tensor<DLManagedTensor>(record);
  put_in_inbox(py.Capsule_New(managed, "dltensor", [](PyObject *capsule) {
    // A consumer renames the capsule it takes; one that nobody took still owns its tensor.
    if (!py.Capsule_IsValid(capsule, "dltensor")) return;
    auto *unused = static_cast<DLManagedTensor *>(py.Capsule_GetPointer(capsule, "dltensor"));
    unused->deleter(unused);
  }));
}

}  // namespace

// What torch would export without saying so.
static Refusal refuse_state(PyObject *object, bool may_be_negative) {
  if (truth_of_attribute(object, kRequiresGrad)) {
    return {"ERR_UNSUPPORTED_TENSOR", "a tensor that requires grad", "Call detach() on it first"};
  }
  if (may_be_negative && truth_of_method(object, kIsNeg)) {
    return {"ERR_UNSUPPORTED_TENSOR", "a tensor with its negative bit set", "Call resolve_neg() on it first"};
  }
  return {};
}

Refusal refuse_object(PyObject *object) {
  if (torch.tensor_type == nullptr || !is_tensor(object)) {
    return {"ERR_NOT_A_TENSOR", "a Python object of another type", "Pass a torch.Tensor or an epmoe Tensor"};
  }
  return refuse_state(object, true);
}

Refusal read_object(PyObject *object, DLTensor *out) {
  if (torch.tensor_type == nullptr || !is_tensor(object)) {
    return {"ERR_NOT_A_TENSOR", "a Python object of another type", "Pass a torch.Tensor or an epmoe Tensor"};
  }
  if (torch.exchange == nullptr || torch.exchange->dltensor_from_py_object_no_sync(object, out) != 0) {
    py.Err_Clear();
    return {"ERR_UNSUPPORTED_TENSOR", name_unsupported(object), "Make it a dense tensor with memory of its own first"};
  }
  // Integers require no grad and have no negative bit, which arises only from complex numbers; the look-ups cost more
  // than the exchange, so they are kept to where they can matter.
  const bool real = out->dtype.code == kDLFloat;
  return real || out->dtype.code == kDLBfloat ? refuse_state(object, real) : Refusal{};
}

const char *name_unsupported(PyObject *object) {
  if (truth_of_attribute(object, kIsSparse)) return "a sparse tensor";
  if (truth_of_attribute(object, kIsQuantized)) return "a quantised tensor";
  if (truth_of_attribute(object, kIsMeta)) return "a meta tensor, which has no memory";
  return "a tensor whose layout or dtype DLPack cannot describe";
}

void record_object(Environment &environment, PyObject *object) {
  DLManagedTensorVersioned *managed = nullptr;
  if (torch.exchange->managed_tensor_from_py_object_no_sync(object, &managed) != 0)
    raise_unsupported(environment, object);
  environment.recording->keep(make_record(Storage::adopt(environment, managed), managed->dl_tensor)->storage);
  environment.recording->foreign = true;
}

bool has_exchange() { return torch.exchange != nullptr; }

void export_python(Napi::Env env, Napi::Object exports) {
  Napi::Object python = Napi::Object::New(env);
  python["attach"] = Napi::Function::New(env, attach);
  python["hasExchange"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) -> Napi::Value {
    return Napi::Boolean::New(info.Env(), has_exchange());
  });
  python["check"] = Napi::Function::New(env, check);
  python["fromObject"] = Napi::Function::New(env, from_object);
  python["fromCapsule"] = Napi::Function::New(env, from_capsule);
  python["toObject"] = Napi::Function::New(env, to_object);
  python["toCapsule"] = Napi::Function::New(env, to_capsule);
  exports["python"] = python;
}

}  // namespace epmoe::node
