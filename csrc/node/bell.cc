// A bell that any thread may ring to have JavaScript look for news. Python rings it through a plain C function, so its
// thread never waits for JavaScript's. It holds the GIL then: whoever holds the bell's mutex must not want it.
#include <atomic>
#include <mutex>

#include "node/environment.h"

namespace epmoe::node {
namespace {

struct Bell {
  std::mutex mutex;
  napi_threadsafe_function function = nullptr;
  std::atomic<bool> rung{false};  // and not yet answered: further rings would only repeat it
};

// One for the process: there is one interpreter, and it lives on the main thread.
Bell &bell() {
  static Bell *one = new Bell;  // never destroyed: a thread of Python's may ring until the very end
  return *one;
}

void ring() {
  Bell &b = bell();
  const std::lock_guard<std::mutex> lock(b.mutex);
  if (b.function == nullptr || b.rung.exchange(true)) return;
  if (napi_call_threadsafe_function(b.function, nullptr, napi_tsfn_nonblocking) != napi_ok) b.rung = false;
}

void answer(napi_env env, napi_value callback, void *, void *) {
  bell().rung = false;
  if (env == nullptr) return;
  napi_value receiver = nullptr;
  napi_get_undefined(env, &receiver);
  napi_call_function(env, receiver, callback, 0, nullptr, nullptr);
}

void close(void *) {
  Bell &b = bell();
  const std::lock_guard<std::mutex> lock(b.mutex);
  b.function = nullptr;
}

// (callback): its address is returned for whoever is to ring. The bell alone keeps no process alive.
Napi::Value open(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  Bell &b = bell();
  const std::lock_guard<std::mutex> lock(b.mutex);
  const napi_status status =
      napi_create_threadsafe_function(env, info[0], nullptr, Napi::String::New(env, "epmoe bell"), 0, 1, nullptr,
                                      nullptr, nullptr, answer, &b.function);
  if (status != napi_ok) {
    Environment::of(env).raise("ERR_INTERNAL", "", "", "a thread-safe function", "none", "");
  }
  napi_unref_threadsafe_function(env, b.function);
  napi_add_env_cleanup_hook(env, close, nullptr);
  return Napi::Number::New(env, static_cast<double>(reinterpret_cast<uintptr_t>(&ring)));
}

// (whether the process is to stay alive for the next ring)
void hold(const Napi::CallbackInfo &info) {
  napi_threadsafe_function function = bell().function;
  if (function == nullptr) return;
  if (info[0].As<Napi::Boolean>().Value())
    napi_ref_threadsafe_function(info.Env(), function);
  else
    napi_unref_threadsafe_function(info.Env(), function);
}

}  // namespace

void export_bell(Napi::Env env, Napi::Object exports) {
  Napi::Object object = Napi::Object::New(env);
  object["open"] = Napi::Function::New(env, open);
  object["hold"] = Napi::Function::New(env, hold);
  exports["bell"] = object;
}

}  // namespace epmoe::node
