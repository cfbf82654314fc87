// Seeded data and comparison, for parity.
#include "node/environment.h"
#include "node/tensor.h"

namespace epmoe::node {
namespace {

// (tensor, seed, scale)
void fill_normal(const Napi::CallbackInfo &info) {
  Environment::of(info.Env())
      .require(epmoe_fill_normal(&require_tensor(info, 0).dl,
                                 static_cast<uint64_t>(info[1].As<Napi::Number>().Int64Value()),
                                 info[2].As<Napi::Number>().DoubleValue()));
}

// (actual, reference, oracle, scale)
Napi::Value compare(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  epmoe_metrics metrics;
  Environment::of(env).require(epmoe_compare(&require_tensor(info, 0).dl, &require_tensor(info, 1).dl,
                                             &require_tensor(info, 2).dl, &require_tensor(info, 3).dl, &metrics));
  const auto number = [&](double value) { return Napi::Number::New(env, value); };
  Napi::Object result = Napi::Object::New(env);
  result["mismatched"] = number(static_cast<double>(metrics.mismatched));
  result["total"] = number(static_cast<double>(metrics.total));
  result["maxUlp"] = number(metrics.max_ulp);
  result["maxAbs"] = number(metrics.max_abs);
  result["relL2"] = number(metrics.rel_l2);
  result["referenceRelL2"] = number(metrics.reference_rel_l2);
  return result;
}

}  // namespace

void export_parity(Napi::Env env, Napi::Object exports) {
  Napi::Object parity = Napi::Object::New(env);
  parity["fillNormal"] = Napi::Function::New(env, fill_normal);
  parity["compare"] = Napi::Function::New(env, compare);
  exports["parity"] = parity;
}

}  // namespace epmoe::node
