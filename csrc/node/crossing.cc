// Calls from JavaScript into Python. Arguments come as a row of tokens in a Float64Array, with texts beside it; results
// leave as the address of an object that JavaScript now owns a reference to. What fails, fails in Python, where
// python/epmoe/_bridge.py makes a text of it.
#include "node/cpython.h"
#include "node/environment.h"

namespace epmoe::node {
namespace {

// As src/python/encode.ts writes them, each with a word behind it.
enum Token { kNone, kFalse, kTrue, kInt, kFloat, kLargeInt, kText, kAddress, kList, kDict };

// Of epmoe._bridge.
PyObject *guard = nullptr;
PyObject *raise_error = nullptr;

PyObject *object_at(double address) { return reinterpret_cast<PyObject *>(static_cast<uintptr_t>(address)); }

// Builds the objects that a row of tokens describes. Results are new references, or nullptr with Python's error set.
class Reader {
 public:
  Reader(napi_env env, const double *tokens, size_t count, napi_value texts)
      : env_(env), next_(tokens), end_(tokens + count), texts_(texts) {}

  PyObject *read() {
    if (end_ - next_ < 2) return nullptr;
    const auto token = static_cast<Token>(*next_++);
    const double word = *next_++;
    switch (token) {
      case kNone:
        return copy(py.None);
      case kFalse:
      case kTrue:
        return py.Bool_FromLong(token == kTrue);
      case kInt:
        return py.Long_FromLongLong(static_cast<long long>(word));
      case kFloat:
        return py.Float_FromDouble(word);
      case kLargeInt:
        return large_int(word);
      case kText:
        return text(word);
      case kAddress:
        return copy(object_at(word));
      case kList:
        return list(static_cast<ptrdiff_t>(word));
      case kDict:
        return dict(static_cast<ptrdiff_t>(word));
    }
    return nullptr;
  }

  // The same for a list's tokens, as a tuple.
  PyObject *read_tuple() {
    if (end_ - next_ < 2 || *next_++ != kList) return nullptr;
    const auto count = static_cast<ptrdiff_t>(*next_++);
    Owned tuple(py.Tuple_New(count));
    for (ptrdiff_t i = 0; tuple && i < count; ++i) {
      PyObject *item = read();
      if (item == nullptr) return nullptr;
      py.Tuple_SetItem(tuple.get(), i, item);
    }
    return tuple.release();
  }

 private:
  static PyObject *copy(PyObject *object) {
    py.IncRef(object);
    return object;
  }

  PyObject *list(ptrdiff_t count) {
    Owned list(py.List_New(count));
    for (ptrdiff_t i = 0; list && i < count; ++i) {
      PyObject *item = read();
      if (item == nullptr) return nullptr;
      py.List_SetItem(list.get(), i, item);
    }
    return list.release();
  }

  PyObject *dict(ptrdiff_t count) {
    Owned dict(py.Dict_New());
    for (ptrdiff_t i = 0; dict && i < count; ++i) {
      const Owned key(read());
      if (!key) return nullptr;
      const Owned value(read());
      if (!value || py.Dict_SetItem(dict.get(), key.get(), value.get()) != 0) return nullptr;
    }
    return dict.release();
  }

  // UTF-16 is what JavaScript has; half a surrogate pair is a character to both.
  PyObject *text(double index) {
    const napi_value value = text_at(index);
    size_t length = 0;
    if (napi_get_value_string_utf16(env_, value, short_, std::size(short_), &length) != napi_ok) return nullptr;
    const char16_t *units = short_;
    std::u16string longer;
    if (length == std::size(short_) - 1) {
      napi_get_value_string_utf16(env_, value, nullptr, 0, &length);
      longer.resize(length + 1);
      napi_get_value_string_utf16(env_, value, longer.data(), longer.size(), &length);
      units = longer.data();
    }
    int order = kNativeOrder;
    return py.Unicode_DecodeUTF16(reinterpret_cast<const char *>(units), static_cast<ptrdiff_t>(2 * length),
                                  "surrogatepass", &order);
  }

  PyObject *large_int(double index) {
    const napi_value value = text_at(index);
    size_t length = 0;
    if (napi_get_value_string_latin1(env_, value, nullptr, 0, &length) != napi_ok) return nullptr;
    std::string digits(length + 1, '\0');
    napi_get_value_string_latin1(env_, value, digits.data(), digits.size(), &length);
    return py.Long_FromString(digits.c_str(), nullptr, 16);
  }

  napi_value text_at(double index) {
    napi_value value = nullptr;
    napi_get_element(env_, texts_, static_cast<uint32_t>(index), &value);
    return value;
  }

  // Without one, a text that begins with a byte order mark would lose it.
  static constexpr int kNativeOrder = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? -1 : 1;

  napi_env env_;
  const double *next_, *end_;
  napi_value texts_;
  char16_t short_[128];
};

[[noreturn]] void raise(napi_env env, const char *received) {
  Environment::of(env).raise("ERR_PYTHON", "", "", "a running interpreter", received, "");
}

// Calls a function of the bridge's by way of its guard. `arguments` is a tuple, which is given up.
PyObject *call_guarded(PyObject *function, PyObject *arguments) {
  const Owned operands(py.Tuple_New(2));
  if (!operands || arguments == nullptr) return nullptr;
  py.IncRef(function);
  py.Tuple_SetItem(operands.get(), 0, function);
  py.Tuple_SetItem(operands.get(), 1, arguments);
  return py.Object_CallObject(guard, operands.get());
}

// What failed on this side of the guard, a key that is no key for example, told as if it had failed behind it.
PyObject *call_with_error() {
  PyObject *type = nullptr, *error = nullptr, *traceback = nullptr;
  py.Err_Fetch(&type, &error, &traceback);
  py.Err_NormalizeException(&type, &error, &traceback);
  const Owned owned[] = {Owned(type), Owned(traceback)};
  if (error == nullptr) return nullptr;
  PyObject *arguments = py.Tuple_New(1);
  py.Tuple_SetItem(arguments, 0, error);
  return call_guarded(raise_error, arguments);
}

// (function of the bridge's, tokens, texts): the address of its result, or a string. The first token says which: the
// bytes that letting go of the object would free; -1 for the description of a failure; -2 for a value as text.
napi_value cross(napi_env env, napi_value *arguments) {
  double function = 0;
  void *data = nullptr;
  size_t length = 0;
  napi_get_value_double(env, arguments[0], &function);
  napi_get_typedarray_info(env, arguments[1], nullptr, &length, &data, nullptr, nullptr);
  auto *tokens = static_cast<double *>(data);
  const Gil gil;
  if (!gil.held() || length == 0) raise(env, "one that has ended");
  PyObject *made = call_guarded(object_at(function), Reader(env, tokens, length, arguments[2]).read_tuple());
  const Owned outcome(made != nullptr ? made : call_with_error());
  PyObject *value = outcome ? py.Tuple_GetItem(outcome.get(), 0) : nullptr;
  PyObject *kind = outcome ? py.Tuple_GetItem(outcome.get(), 1) : nullptr;
  napi_value result = nullptr;
  if (value != nullptr && kind != nullptr) {
    tokens[0] = static_cast<double>(py.Long_AsLongLong(kind));
    ptrdiff_t size = 0;
    if (tokens[0] >= 0) {
      py.IncRef(value);
      napi_create_double(env, static_cast<double>(reinterpret_cast<uintptr_t>(value)), &result);
    } else if (const char *text = py.Unicode_AsUTF8AndSize(value, &size); text != nullptr) {
      napi_create_string_latin1(env, text, static_cast<size_t>(size), &result);  // it is ASCII
    }
  }
  if (result == nullptr) {
    py.Err_Clear();
    raise(env, "one that cannot say what failed");
  }
  return result;
}

// In the bare C interface, as calls of ops: wrappers would be a good part of the cost.
napi_value call(napi_env env, napi_callback_info info) {
  size_t count = 3;
  napi_value arguments[3] = {};
  napi_get_cb_info(env, info, &count, arguments, nullptr, nullptr);
  try {
    return cross(env, arguments);
  } catch (const Napi::Error &error) {
    error.ThrowAsJavaScriptException();
  } catch (const std::exception &error) {
    napi_throw_error(env, "ERR_INTERNAL", error.what());
  }
  return nullptr;
}

// (address): JavaScript lets go of a reference. After Python's end there is nothing left to free.
napi_value release(napi_env env, napi_callback_info info) {
  size_t count = 1;
  napi_value argument = nullptr;
  double address = 0;
  napi_get_cb_info(env, info, &count, &argument, nullptr, nullptr);
  napi_get_value_double(env, argument, &address);
  const Gil gil;
  if (gil.held()) py.DecRef(object_at(address));
  return nullptr;
}

// (address): JavaScript takes a reference to an object that somebody else holds.
void hold(const Napi::CallbackInfo &info) {
  const Gil gil;
  if (gil.held()) py.IncRef(object_at(info[0].As<Napi::Number>().DoubleValue()));
}

// (the bridge's guard, and its function that raises), as addresses, once the interpreter runs.
void start(const Napi::CallbackInfo &info) {
  if (const char *absent = find_cpython()) {
    Environment::of(info.Env())
        .raise("ERR_PYTHON", "", "libpython", "an interpreter loaded into the process with its symbols global",
               std::string("no symbol ") + absent, "Start Python with startPython()");
  }
  const Gil gil;
  guard = object_at(info[0].As<Napi::Number>().DoubleValue());
  raise_error = object_at(info[1].As<Napi::Number>().DoubleValue());
  py.IncRef(guard);
  py.IncRef(raise_error);
}

}  // namespace

void export_crossing(Napi::Env env, Napi::Object exports) {
  Napi::Object crossing = Napi::Object::New(env);
  napi_value function = nullptr;
  napi_create_function(env, "call", NAPI_AUTO_LENGTH, call, nullptr, &function);
  crossing["call"] = Napi::Value(env, function);
  napi_create_function(env, "release", NAPI_AUTO_LENGTH, release, nullptr, &function);
  crossing["release"] = Napi::Value(env, function);
  crossing["hold"] = Napi::Function::New(env, hold);
  crossing["start"] = Napi::Function::New(env, start);
  exports["crossing"] = crossing;
}

}  // namespace epmoe::node
