// The addon marshals between JavaScript, the C contract and CPython, and does nothing else.
#include "node/environment.h"

namespace epmoe::node {
namespace {

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));
  Environment &environment = Environment::of(env);
  exports["abiVersion"] = Napi::Number::New(env, epmoe_abi_version());
  exports["headerAbiVersion"] = Napi::Number::New(env, EPMOE_ABI_VERSION);
  exports["version"] = Napi::String::New(env, epmoe_version());
  exports["frame"] = environment.frame_buffer.Value();
  exports["maxValues"] = Napi::Number::New(env, kMaxValues);
  // Errors are built by JavaScript, so that they are instances of the class users catch.
  exports["setErrorMaker"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) {
    Environment::of(info.Env()).error_maker = Napi::Persistent(info[0].As<Napi::Function>());
  });
  export_tensors(env, exports);
  export_calls(env, exports);
  export_streams(env, exports);
  export_graphs(env, exports);
  export_python(env, exports);
  export_parity(env, exports);
  export_bell(env, exports);
  export_crossing(env, exports);
  return exports;
}

}  // namespace
}  // namespace epmoe::node

static Napi::Object Init(Napi::Env env, Napi::Object exports) { return epmoe::node::init(env, exports); }
NODE_API_MODULE(epmoe, Init)
