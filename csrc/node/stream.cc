// Devices, streams and events. A stream crosses as its address, which a JavaScript number holds exactly, an event as a
// number.
#include "node/environment.h"
#include "node/python.h"

namespace epmoe::node {

Event::Event(Environment &environment, int32_t device_id, bool timed) : device_id(device_id) {
  environment.require(epmoe_event_create(device_id, timed ? 1 : 0, &event));
}

Event::~Event() {
  if (event != nullptr) epmoe_event_destroy(device_id, event);
}

namespace {

int32_t device_argument(const Napi::CallbackInfo &info) { return info[0].As<Napi::Number>().Int32Value(); }

void *stream_argument(const Napi::CallbackInfo &info) {
  return reinterpret_cast<void *>(static_cast<uintptr_t>(info[1].As<Napi::Number>().DoubleValue()));
}

Napi::Value address(Napi::Env env, void *stream) {
  return Napi::Number::New(env, static_cast<double>(reinterpret_cast<uintptr_t>(stream)));
}

template <epmoe_status (*function)(int32_t, void **)>
Napi::Value give_stream(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  void *stream = nullptr;
  const Gil gil;  // the framework's current stream is asked for under its lock
  environment.require(function(device_argument(info), &stream));
  return address(info.Env(), stream);
}

// Waits on a thread of libuv's pool, so that the event loop goes on.
class Wait : public Napi::AsyncWorker {
 public:
  Wait(Napi::Env env, std::shared_ptr<Event> event)
      : Napi::AsyncWorker(env), deferred_(Napi::Promise::Deferred::New(env)), event_(std::move(event)) {}
  Napi::Promise promise() const { return deferred_.Promise(); }

  void Execute() override {
    status_ = epmoe_event_synchronize(event_->device_id, event_->event);
    if (status_ == EPMOE_OK) return;
    const epmoe_error *error = epmoe_last_error();  // of this thread: copied before it goes back to the pool
    op_ = error->op;
    argument_ = error->argument;
    expected_ = error->expected;
    received_ = error->received;
    hint_ = error->hint;
  }
  void OnOK() override {
    if (status_ == EPMOE_OK) return deferred_.Resolve(Env().Undefined());
    deferred_.Reject(
        Environment::of(Env()).make_error(epmoe_status_code(status_), op_, argument_, expected_, received_, hint_));
  }

 private:
  Napi::Promise::Deferred deferred_;
  std::shared_ptr<Event> event_;
  epmoe_status status_ = EPMOE_OK;
  std::string op_, argument_, expected_, received_, hint_;
};

Napi::Value wait_for(Napi::Env env, std::shared_ptr<Event> event) {
  auto *wait = new Wait(env, std::move(event));
  const Napi::Promise promise = wait->promise();
  wait->Queue();
  return promise;
}

// An event marks the work of now: by the time that the pool gets to it, the stream may have more, be captured or gone.
Napi::Value synchronize(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  auto event = std::make_shared<Event>(environment, device_argument(info), false);
  environment.require(epmoe_event_record(event->device_id, event->event, stream_argument(info)));
  return wait_for(info.Env(), std::move(event));
}

void synchronize_sync(const Napi::CallbackInfo &info) {
  Environment::of(info.Env()).require(epmoe_stream_synchronize(device_argument(info), stream_argument(info)));
}

void destroy(const Napi::CallbackInfo &info) {
  Environment::of(info.Env()).forget_stream({device_argument(info), stream_argument(info)});
  Environment::of(info.Env()).require(epmoe_stream_destroy(device_argument(info), stream_argument(info)));
}

const std::shared_ptr<Event> &event_argument(const Napi::CallbackInfo &info, size_t index) {
  Environment &environment = Environment::of(info.Env());
  const auto found = environment.events.find(info[index].As<Napi::Number>().DoubleValue());
  if (found == environment.events.end()) {
    environment.raise("ERR_DISPOSED", "Event", "", "a live event", "a disposed one", "Keep it until its last use");
  }
  return found->second;
}

// (device, whether it measures time): returns the event's number.
Napi::Value create_event(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  auto event = std::make_shared<Event>(environment, device_argument(info), info[1].As<Napi::Boolean>().Value());
  environment.events.emplace(++environment.last_event, std::move(event));
  return Napi::Number::New(info.Env(), environment.last_event);
}

void forget_event(const Napi::CallbackInfo &info) {
  Environment::of(info.Env()).events.erase(info[0].As<Napi::Number>().DoubleValue());
}

// (event, stream)
void record_event(const Napi::CallbackInfo &info) {
  const Event &event = *event_argument(info, 0);
  Environment::of(info.Env()).require(epmoe_event_record(event.device_id, event.event, stream_argument(info)));
}

// (device of the stream, stream, event)
void wait_event(const Napi::CallbackInfo &info) {
  Environment::of(info.Env())
      .require(epmoe_stream_wait_event(device_argument(info), stream_argument(info), event_argument(info, 2)->event));
}

Napi::Value query_event(const Napi::CallbackInfo &info) {
  const Event &event = *event_argument(info, 0);
  int32_t done = 0;
  Environment::of(info.Env()).require(epmoe_event_query(event.device_id, event.event, &done));
  return Napi::Boolean::New(info.Env(), done != 0);
}

Napi::Value synchronize_event(const Napi::CallbackInfo &info) { return wait_for(info.Env(), event_argument(info, 0)); }

void synchronize_event_sync(const Napi::CallbackInfo &info) {
  const Event &event = *event_argument(info, 0);
  Environment::of(info.Env()).require(epmoe_event_synchronize(event.device_id, event.event));
}

// (begin, end): milliseconds.
Napi::Value elapsed(const Napi::CallbackInfo &info) {
  const Event &begin = *event_argument(info, 0);
  double milliseconds = 0;
  Environment::of(info.Env())
      .require(epmoe_event_elapsed(begin.device_id, begin.event, event_argument(info, 1)->event, &milliseconds));
  return Napi::Number::New(info.Env(), milliseconds);
}

Napi::Value facts(const Napi::CallbackInfo &info) {
  Napi::Env env = info.Env();
  epmoe_device_facts facts;
  Environment::of(env).require(epmoe_device_query(device_argument(info), &facts));
  const auto number = [&](double value) { return Napi::Number::New(env, value); };
  Napi::Object result = Napi::Object::New(env);
  result["name"] = Napi::String::New(env, facts.name);
  result["computeCapability"] =
      Napi::String::New(env, std::to_string(facts.cc_major) + "." + std::to_string(facts.cc_minor));
  result["smCount"] = number(facts.sm_count);
  result["l2Bytes"] = number(static_cast<double>(facts.l2_bytes));
  result["totalBytes"] = number(static_cast<double>(facts.total_bytes));
  result["driverVersion"] = number(facts.driver_version);
  result["runtimeVersion"] = number(facts.runtime_version);
  return result;
}

}  // namespace

void export_streams(Napi::Env env, Napi::Object exports) {
  Napi::Object stream = Napi::Object::New(env);
  stream["create"] = Napi::Function::New(env, give_stream<epmoe_stream_create>);
  stream["own"] = Napi::Function::New(env, give_stream<epmoe_stream_own>);
  stream["foreign"] = Napi::Function::New(env, give_stream<epmoe_stream_foreign>);
  stream["destroy"] = Napi::Function::New(env, destroy);
  stream["synchronize"] = Napi::Function::New(env, synchronize);
  stream["synchronizeSync"] = Napi::Function::New(env, synchronize_sync);
  stream["waitEvent"] = Napi::Function::New(env, wait_event);
  exports["stream"] = stream;
  Napi::Object event = Napi::Object::New(env);
  event["create"] = Napi::Function::New(env, create_event);
  event["forget"] = Napi::Function::New(env, forget_event);
  event["record"] = Napi::Function::New(env, record_event);
  event["query"] = Napi::Function::New(env, query_event);
  event["synchronize"] = Napi::Function::New(env, synchronize_event);
  event["synchronizeSync"] = Napi::Function::New(env, synchronize_event_sync);
  event["elapsed"] = Napi::Function::New(env, elapsed);
  exports["event"] = event;
  Napi::Object device = Napi::Object::New(env);
  device["cudaCompiled"] = Napi::Boolean::New(env, epmoe_cuda_compiled() != 0);
  device["cudaCount"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) -> Napi::Value {
    return Napi::Number::New(info.Env(), epmoe_cuda_device_count());
  });
  // Why there are no devices; empty when there are, or when this build could not have any.
  device["cudaProblem"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) -> Napi::Value {
    const bool none = epmoe_cuda_compiled() != 0 && epmoe_cuda_device_count() == 0;
    return Napi::String::New(info.Env(), none ? epmoe_last_error()->received : "");
  });
  device["peerAccess"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) -> Napi::Value {
    int32_t access = 0;
    Environment::of(info.Env())
        .require(epmoe_peer_access(info[0].As<Napi::Number>().Int32Value(), info[1].As<Napi::Number>().Int32Value(),
                                   &access));
    return Napi::Boolean::New(info.Env(), access != 0);
  });
  device["facts"] = Napi::Function::New(env, facts);
  device["setCpuThreads"] = Napi::Function::New(
      env, [](const Napi::CallbackInfo &info) { epmoe_set_cpu_threads(info[0].As<Napi::Number>().Int32Value()); });
  device["cpuThreads"] = Napi::Function::New(env, [](const Napi::CallbackInfo &info) -> Napi::Value {
    return Napi::Number::New(info.Env(), epmoe_cpu_threads());
  });
  exports["device"] = device;
}

}  // namespace epmoe::node
