// Ops: their descriptors as JavaScript objects, and calls made from the frame.
#include "node/environment.h"
#include "node/python.h"

namespace epmoe::node {
namespace {

[[noreturn]] void raise_argument(Environment &environment, const epmoe_op_info &op, int32_t index, const char *code,
                                 const char *received, const char *hint) {
  environment.raise(code, op.name, op.params[index].name, "a tensor", received, hint);
}

// The stream that the frame asks for, or else the captured one, torch's current one when a tensor is torch's, or our
// own. The frame's stream mode is 0, or 1 and the number of the stream's device.
StreamRef stream_of(Environment &environment, const char *op, int32_t gpu, bool foreign) {
  const Frame &frame = *environment.frame;
  const int32_t device_id = frame.kind[kMaxValues] - 1;
  if (device_id < 0) {
    if (environment.recording != nullptr) return environment.recording->stream;
    return foreign ? environment.foreign_stream(gpu) : environment.own_stream(gpu);
  }
  if (device_id != gpu) {
    environment.raise("ERR_DEVICE", op, "stream", "a stream of cuda:" + std::to_string(gpu) + ", as the tensors",
                      "one of cuda:" + std::to_string(device_id), "Leave it out, or move the tensors there first");
  }
  return {device_id, reinterpret_cast<void *>(static_cast<uintptr_t>(frame.word[kMaxValues]))};
}

// One call's tensors: those of handles, and descriptions of Python's.
class Arguments {
 public:
  Arguments(Environment &environment, const epmoe_op_info &op) : environment_(environment), op_(op) {
    const Frame &frame = *environment.frame;
    read_objects(frame);
    for (int32_t i = 0; i < op.n_params; ++i) take(frame, i);
  }

  // Runs the op on the stream asked for, or else torch's current stream when a tensor is torch's, or else our own.
  // Tensors that were last used on another stream are waited for.
  epmoe_status run() {
    StreamRef stream;
    if (gpu_ >= 0) {
      stream = stream_of(environment_, op_.name, gpu_, foreign_);
      for (int32_t i = 0; i < op_.n_params; ++i) {
        if (records_[i] != nullptr && records_[i]->dl.device.device_type == kDLCUDA) {
          environment_.follow(*records_[i], stream);
        }
      }
    }
    return epmoe_invoke(&op_, values_, op_.n_params, EPMOE_STREAM_GIVEN, stream.address);
  }

  // Keeps the call for later; its tensors are all handles, which JavaScript has seen to.
  double prepare() {
    Environment::Prepared prepared;
    epmoe_prepared *call = nullptr;
    environment_.require(epmoe_prepare(&op_, values_, op_.n_params, &call));
    prepared.call.reset(call);
    for (int32_t i = 0; i < op_.n_params; ++i) {
      if (records_[i] != nullptr) prepared.handles.push_back(environment_.frame->word[i]);
    }
    prepared.gpu = gpu_;
    prepared.foreign = foreign_;
    const double number = ++environment_.last_prepared;
    environment_.prepared.emplace(number, std::move(prepared));
    return number;
  }

 private:
  // The GIL is held while Python's tensors are read, and no longer: a CPU op may run for a while.
  void read_objects(const Frame &frame) {
    bool any = false;
    for (int32_t i = 0; i < op_.n_params; ++i) any |= frame.kind[i] == kObject;
    if (!any) return;
    const Gil gil;
    for (int32_t i = 0; i < op_.n_params; ++i) {
      if (frame.kind[i] != kObject) continue;
      auto *object = reinterpret_cast<PyObject *>(static_cast<uintptr_t>(frame.word[i]));
      if (const Refusal refusal = read_object(object, &borrowed_[i]); refusal.code != nullptr) {
        raise_argument(environment_, op_, i, refusal.code, refusal.received, refusal.hint);
      }
      if (environment_.recording != nullptr) record_object(environment_, object);
    }
  }

  void take(const Frame &frame, int32_t i) {
    epmoe_value &value = values_[i];
    records_[i] = nullptr;
    switch (frame.kind[i]) {
      case kHandle:
        records_[i] = environment_.find(frame.word[i]);
        if (records_[i] == nullptr) {
          raise_argument(environment_, op_, i, "ERR_DISPOSED", "a disposed one", "Keep it until its last use");
        }
        if (records_[i]->storage->read_only && op_.params[i].role == EPMOE_ROLE_OUT) {
          raise_argument(environment_, op_, i, "ERR_READ_ONLY", "a read-only one",
                         "Give the op an output it may write");
        }
        value.kind = EPMOE_VALUE_TENSOR;
        value.as.tensor = &records_[i]->dl;
        note(records_[i]->dl, records_[i]->foreign);
        break;
      case kObject:
        value.kind = EPMOE_VALUE_TENSOR;
        value.as.tensor = &borrowed_[i];
        note(borrowed_[i], true);
        break;
      case kInteger:
        value.kind = EPMOE_VALUE_INT;
        value.as.i = static_cast<int64_t>(frame.word[i]);
        break;
      case kReal:
        value.kind = EPMOE_VALUE_FLOAT;
        value.as.f = frame.word[i];
        break;
      default:
        value.kind = EPMOE_VALUE_NONE;
    }
  }

  void note(const DLTensor &tensor, bool foreign) {
    if (tensor.device.device_type != kDLCUDA) return;
    if (gpu_ < 0) gpu_ = tensor.device.device_id;
    foreign_ |= foreign && has_exchange();
  }

  Environment &environment_;
  const epmoe_op_info &op_;
  epmoe_value values_[kMaxValues];
  DLTensor borrowed_[kMaxValues];
  TensorRecord *records_[kMaxValues];
  int32_t gpu_ = -1;
  bool foreign_ = false;
};

const epmoe_op_info &op_of_frame(Environment &environment) {
  const epmoe_op_info *op = epmoe_op_at(environment.frame->op);
  if (op == nullptr || op->n_params > kMaxValues) {
    environment.raise("ERR_UNKNOWN_OP", "", "", "an op of this library", "an index past its table", "");
  }
  return *op;
}

// Prepares the call that stands in the frame; returns its number.
Napi::Value prepare(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  return Napi::Number::New(info.Env(), Arguments(environment, op_of_frame(environment)).prepare());
}

void run_prepared_call(Environment &environment, double number) {
  const auto found = environment.prepared.find(number);
  if (found == environment.prepared.end()) {
    environment.raise("ERR_DISPOSED", "PreparedCall", "", "a live call", "a disposed one",
                      "Keep it until its last use");
  }
  const Environment::Prepared &prepared = found->second;
  StreamRef stream;
  if (prepared.gpu >= 0) stream = stream_of(environment, "PreparedCall", prepared.gpu, prepared.foreign);
  for (const double handle : prepared.handles) {
    TensorRecord *record = environment.find(handle);
    if (record == nullptr) {
      environment.raise("ERR_DISPOSED", "PreparedCall", "", "live tensors", "one that was disposed",
                        "Keep them until the call's last run");
    }
    if (record->dl.device.device_type == kDLCUDA) environment.follow(*record, stream);
  }
  environment.require(epmoe_prepared_run(prepared.call.get(), EPMOE_STREAM_GIVEN, stream.address));
}

// (number), in the bare C interface for the same reason as invoke() below.
napi_value run_prepared(napi_env env, napi_callback_info info) {
  void *data = nullptr;
  size_t count = 1;
  napi_value argument = nullptr;
  napi_get_cb_info(env, info, &count, &argument, nullptr, &data);
  double number = 0;
  napi_get_value_double(env, argument, &number);
  try {
    run_prepared_call(*static_cast<Environment *>(data), number);
  } catch (const Napi::Error &error) {
    error.ThrowAsJavaScriptException();
  } catch (const std::exception &error) {
    napi_throw_error(env, "ERR_INTERNAL", error.what());
  }
  return nullptr;
}

void forget_prepared(const Napi::CallbackInfo &info) {
  Environment::of(info.Env()).prepared.erase(info[0].As<Napi::Number>().DoubleValue());
}

// Runs the op whose index stands in the frame, on the frame's values. In the bare C interface, without arguments or a
// result: what a wrapper does for comfort would be a third of the cost of the call.
napi_value invoke(napi_env env, napi_callback_info info) {
  void *data = nullptr;
  napi_get_cb_info(env, info, nullptr, nullptr, nullptr, &data);
  auto &environment = *static_cast<Environment *>(data);
  try {
    environment.require(Arguments(environment, op_of_frame(environment)).run());
  } catch (const Napi::Error &error) {
    error.ThrowAsJavaScriptException();
  } catch (const std::exception &error) {
    napi_throw_error(env, "ERR_INTERNAL", error.what());
  }
  return nullptr;
}

// Everything a code generator or a help text needs to know.
Napi::Value ops(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  Napi::Array list = Napi::Array::New(env);
  const auto text = [&](const char *value) { return Napi::String::New(env, value); };
  for (int32_t i = 0; epmoe_op_at(i) != nullptr; ++i) {
    const epmoe_op_info &op = *epmoe_op_at(i);
    Napi::Array params = Napi::Array::New(env);
    for (int32_t p = 0; p < op.n_params; ++p) {
      const epmoe_param &param = op.params[p];
      const char *const kinds[] = {"tensor", "int", "float", "enum"};
      Napi::Object entry = Napi::Object::New(env);
      entry["name"] = text(param.name);
      entry["doc"] = text(param.doc);
      entry["kind"] = text(kinds[param.kind]);
      entry["optional"] = Napi::Boolean::New(env, param.optional != 0);
      if (param.kind == EPMOE_KIND_TENSOR) {
        entry["role"] = text(param.role == EPMOE_ROLE_OUT ? "out" : "in");
        entry["shape"] = text(param.shape);
        Napi::Array dtypes = Napi::Array::New(env);
        for (int32_t d = 0; epmoe_dtype_at(d) != nullptr; ++d) {
          if (param.dtypes & (1u << d)) dtypes[dtypes.Length()] = text(epmoe_dtype_at(d)->name);
        }
        entry["dtypes"] = dtypes;
        if (param.dtype_like >= 0) entry["dtypeLike"] = text(op.params[param.dtype_like].name);
      } else {
        entry["default"] = Napi::Number::New(env, param.default_value);
        entry["min"] = Napi::Number::New(env, param.min_value);
        entry["max"] = Napi::Number::New(env, param.max_value);
        if (param.kind == EPMOE_KIND_ENUM) {
          Napi::Array choices = Napi::Array::New(env);
          for (int32_t c = 0; c < param.n_choices; ++c) choices[static_cast<uint32_t>(c)] = text(param.choices[c]);
          entry["choices"] = choices;
        }
      }
      params[static_cast<uint32_t>(p)] = entry;
    }
    Napi::Object entry = Napi::Object::New(env);
    entry["name"] = text(op.name);
    entry["doc"] = text(op.doc);
    entry["cuda"] = Napi::Boolean::New(env, op.has_cuda != 0);
    entry["params"] = params;
    list[static_cast<uint32_t>(i)] = entry;
  }
  return list;
}

}  // namespace

void export_calls(Napi::Env env, Napi::Object exports) {
  napi_value function = nullptr;
  napi_create_function(env, "invoke", NAPI_AUTO_LENGTH, invoke, &Environment::of(env), &function);
  exports["invoke"] = Napi::Value(env, function);
  napi_create_function(env, "runPrepared", NAPI_AUTO_LENGTH, run_prepared, &Environment::of(env), &function);
  exports["runPrepared"] = Napi::Value(env, function);
  exports["prepare"] = Napi::Function::New(env, prepare);
  exports["forgetPrepared"] = Napi::Function::New(env, forget_prepared);
  exports["ops"] = Napi::Function::New(env, ops);
}

}  // namespace epmoe::node
