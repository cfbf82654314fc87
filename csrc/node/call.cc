// Ops: their descriptors as JavaScript objects, and calls made from the frame.
#include "node/environment.h"
#include "node/python.h"

namespace epmoe::node {
namespace {

[[noreturn]] void raise_argument(Environment &environment, const epmoe_op_info &op, int32_t index, const char *code,
                                 const char *received, const char *hint) {
  environment.raise(code, op.name, op.params[index].name, "a tensor", received, hint);
}

// (op index): runs the op on the frame's values.
Napi::Value invoke(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  const Frame &frame = *environment.frame;
  const epmoe_op_info *op = epmoe_op_at(info[0].As<Napi::Number>().Int32Value());
  if (op == nullptr || op->n_params > kMaxValues) {
    environment.raise("ERR_UNKNOWN_OP", "", "", "an op of this library", "an index past its table", "");
  }
  epmoe_value values[kMaxValues];
  bool objects = false;
  for (int32_t i = 0; i < op->n_params; ++i) objects |= frame.kind[i] == kObject;
  // Held across the call: the library reads the objects while it checks, and launching does not wait for anything.
  // CPU ops on torch tensors hold it as well, like torch's own bindings would not; see the threads note in epmoe.h.
  const Gil gil(objects);
  for (int32_t i = 0; i < op->n_params; ++i) {
    epmoe_value &value = values[i];
    switch (frame.kind[i]) {
      case kHandle: {
        const TensorRecord *record = environment.find(frame.word[i]);
        if (record == nullptr) {
          raise_argument(environment, *op, i, "ERR_DISPOSED", "a disposed one", "Keep it until its last use");
        }
        if (record->storage->read_only && op->params[i].role == EPMOE_ROLE_OUT) {
          raise_argument(environment, *op, i, "ERR_READ_ONLY", "a read-only one", "Give the op an output it may write");
        }
        value.kind = record->foreign ? EPMOE_VALUE_FOREIGN : EPMOE_VALUE_TENSOR;
        value.as.tensor = &record->dl;
        break;
      }
      case kObject: {
        auto *object = reinterpret_cast<PyObject *>(static_cast<uintptr_t>(frame.word[i]));
        if (const char *reason = refuse_object(object)) {
          const bool tensor = reason[2] == 't';
          raise_argument(environment, *op, i, tensor ? "ERR_UNSUPPORTED_TENSOR" : "ERR_NOT_A_TENSOR", reason,
                         tensor ? "Call detach() or resolve_neg() on it first" : "Pass a torch.Tensor or an epmoe Tensor");
        }
        value.kind = EPMOE_VALUE_OBJECT;
        value.as.object = object;
        break;
      }
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
  auto *stream = reinterpret_cast<void *>(static_cast<uintptr_t>(frame.word[kMaxValues]));
  const epmoe_status status = epmoe_invoke(op, values, op->n_params, frame.kind[kMaxValues], stream);
  if (status == EPMOE_OK) return info.Env().Undefined();
  if (objects && clear_python_error()) {
    const epmoe_error *error = epmoe_last_error();
    for (int32_t i = 0; i < op->n_params; ++i) {
      if (std::string(op->params[i].name) != error->argument || frame.kind[i] != kObject) continue;
      raise_argument(environment, *op, i, "ERR_UNSUPPORTED_TENSOR", name_unsupported(values[i].as.object),
                     "Make it a dense tensor with memory of its own first");
    }
  }
  environment.raise();
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
  exports["invoke"] = Napi::Function::New(env, invoke);
  exports["ops"] = Napi::Function::New(env, ops);
}

}  // namespace epmoe::node
