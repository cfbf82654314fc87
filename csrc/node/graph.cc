// Captured CUDA graphs: made by running a JavaScript function, replayed by one bare call.
#include "node/environment.h"

namespace epmoe::node {
namespace {

void *address_of(double number) { return reinterpret_cast<void *>(static_cast<uintptr_t>(number)); }

// Between construction and end() the calls of this thread are captured. However a body comes to its end, a worker's
// termination included, the stream is left as it was.
class Capture {
 public:
  Capture(Environment &environment, Recording &recording) : environment_(environment) {
    environment.require(epmoe_capture_begin(recording.stream.device_id, recording.stream.address));
    environment.recording = &recording;
  }
  ~Capture() {
    if (environment_.recording == nullptr) return;
    environment_.recording = nullptr;
    epmoe_capture_end(nullptr);
  }
  epmoe_graph *end() {
    environment_.recording = nullptr;
    epmoe_graph *graph = nullptr;
    environment_.require(epmoe_capture_end(&graph));
    return graph;
  }
  Capture(const Capture &) = delete;
  Capture &operator=(const Capture &) = delete;

 private:
  Environment &environment_;
};

// (device, stream, body): returns the graph's number.
Napi::Value capture(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  if (environment.recording != nullptr) {
    environment.raise("ERR_CAPTURE", "Graph.capture", "", "one capture at a time", "a capture within a capture",
                      "End the outer one first");
  }
  Environment::Graph graph;
  graph.used.stream = {info[0].As<Napi::Number>().Int32Value(), address_of(info[1].As<Napi::Number>().DoubleValue())};
  Capture running(environment, graph.used);
  const Napi::Value result = info[2].As<Napi::Function>().Call({});
  if (result.IsPromise()) {
    environment.raise("ERR_CAPTURE", "Graph.capture", "body", "a function that is done when it returns", "a Promise",
                      "Prepare what must be awaited before the capture");
  }
  graph.graph.reset(running.end());
  const double number = ++environment.last_graph;
  environment.graphs.emplace(number, std::move(graph));
  return Napi::Number::New(info.Env(), number);
}

// As an op would: after earlier work on the tensors, whichever streams it is on, and before later work on them. torch's
// own work on its tensors is on torch's current stream.
void replay_graph(Environment &environment, double number, void *address) {
  const auto found = environment.graphs.find(number);
  if (found == environment.graphs.end()) {
    environment.raise("ERR_DISPOSED", "Graph", "", "a live graph", "a disposed one", "Keep it until its last replay");
  }
  if (environment.recording != nullptr) {
    environment.raise("ERR_CAPTURE", "Graph", "", "work that a CUDA graph can hold", "the replay of a graph",
                      "Do it before or after the capture");
  }
  const Environment::Graph &graph = found->second;
  const StreamRef stream{graph.used.stream.device_id, address};
  const StreamRef framework = graph.used.foreign ? environment.foreign_stream(stream.device_id) : stream;
  environment.wait(stream, framework);
  for (const double handle : graph.used.handles) {
    TensorRecord *record = environment.find(handle);
    if (record != nullptr && record->dl.device.device_type == kDLCUDA) environment.follow(*record, stream);
  }
  environment.require(epmoe_graph_replay(graph.graph.get(), address));
  environment.wait(framework, stream);
}

// (number, stream), in the bare C interface: it stands beside a launch that takes two microseconds.
napi_value replay(napi_env env, napi_callback_info info) {
  void *data = nullptr;
  size_t count = 2;
  napi_value arguments[2] = {};
  napi_get_cb_info(env, info, &count, arguments, nullptr, &data);
  double number = 0;
  double stream = 0;
  napi_get_value_double(env, arguments[0], &number);
  napi_get_value_double(env, arguments[1], &stream);
  try {
    replay_graph(*static_cast<Environment *>(data), number, address_of(stream));
  } catch (const Napi::Error &error) {
    error.ThrowAsJavaScriptException();
  } catch (const std::exception &error) {
    napi_throw_error(env, "ERR_INTERNAL", error.what());
  }
  return nullptr;
}

void forget(const Napi::CallbackInfo &info) {
  Environment &environment = Environment::of(info.Env());
  environment.graphs.erase(info[0].As<Napi::Number>().DoubleValue());
  environment.drain();
}

}  // namespace

void export_graphs(Napi::Env env, Napi::Object exports) {
  Napi::Object graph = Napi::Object::New(env);
  graph["capture"] = Napi::Function::New(env, capture);
  napi_value function = nullptr;
  napi_create_function(env, "replay", NAPI_AUTO_LENGTH, replay, &Environment::of(env), &function);
  graph["replay"] = Napi::Value(env, function);
  graph["forget"] = Napi::Function::New(env, forget);
  exports["graph"] = graph;
}

}  // namespace epmoe::node
