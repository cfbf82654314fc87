// Captured CUDA graphs. A thread captures one stream at a time, in CUDA's thread-local mode: what other threads do
// meanwhile (torch's allocator, a waiter) neither spoils the capture nor enters it.
#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <string>

#include "core/cuda.h"
#include "core/error.h"

struct epmoe_graph {
  int32_t device_id = 0;
  cudaGraphExec_t executable = nullptr;
  std::mutex mutex;  // CUDA wants launches of one graph to come one after the other

  ~epmoe_graph() {
    if (executable != nullptr) cudaGraphExecDestroy(executable);
  }
};

namespace epmoe::cuda {
namespace {

thread_local Capture capture;
thread_local bool capturing = false;

// 0: not captured. The default stream is another one on each device.
unsigned long long capture_id(int32_t device_id, void *stream) {
  const DeviceGuard guard(device_id);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  const cudaError_t code = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id);
  if (code == cudaErrorStreamCaptureImplicit) {  // the default stream, while a stream that it waits for is captured
    cudaGetLastError();
    return 0;
  }
  expect_success(code, "asking whether a stream is captured");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

void begin(int32_t device_id, void *stream) {
  refuse_in_capture("another capture");
  if (stream == nullptr || stream == cudaStreamLegacy) {
    fail(EPMOE_ERR_CAPTURE, "stream", "a stream of its own", "the default stream, which CUDA does not capture",
         "Create a stream, or make a side stream torch's current one");
  }
  own_stream(device_id);  // what the device needs is made before the capture
  const DeviceGuard guard(device_id);
  if (is_captured(device_id, stream)) {
    fail(EPMOE_ERR_CAPTURE, "stream", "a stream that runs", "one that is being captured already",
         "Capture on a stream of its own");
  }
  expect_success(cudaStreamBeginCapture(static_cast<cudaStream_t>(stream), cudaStreamCaptureModeThreadLocal),
                 "beginning a capture");
  capture = {device_id, stream};
  capturing = true;
}

void end(epmoe_graph **out) {
  if (!capturing) {
    fail(EPMOE_ERR_CAPTURE, "", "a capture that this thread has begun", "none", "Begin one first");
  }
  capturing = false;
  const DeviceGuard guard(capture.device_id);
  cudaGraph_t recorded = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(static_cast<cudaStream_t>(capture.stream), &recorded);
  const std::unique_ptr<CUgraph_st, decltype(&cudaGraphDestroy)> description(recorded, cudaGraphDestroy);
  if (out == nullptr) {
    cudaGetLastError();
    return;
  }
  expect_success(ended, "capturing a graph");
  auto graph = std::make_unique<epmoe_graph>();
  graph->device_id = capture.device_id;
  expect_success(cudaGraphInstantiateWithFlags(&graph->executable, recorded, 0), "instantiating a graph");
  *out = graph.release();
}

}  // namespace

const Capture *current_capture() { return capturing ? &capture : nullptr; }

void refuse_in_capture(const char *what) {
  if (!capturing) return;
  fail(EPMOE_ERR_CAPTURE, "", "work that a CUDA graph can hold", what, "Do it before or after the capture");
}

bool is_captured(int32_t device_id, void *stream) { return capture_id(device_id, stream) != 0; }

Captured captured(int32_t first_device, void *first, int32_t second_device, void *second) {
  const unsigned long long a = capture_id(first_device, first);
  const unsigned long long b = capture_id(second_device, second);
  if (a == b) return a == 0 ? Captured::kNone : Captured::kTogether;
  return b == 0 ? Captured::kFirst : Captured::kSecond;
}

}  // namespace epmoe::cuda

extern "C" epmoe_status epmoe_capture_begin(int32_t device_id, void *stream) {
  return epmoe::guarded([&] { epmoe::cuda::begin(device_id, stream); });
}

extern "C" epmoe_status epmoe_capture_end(epmoe_graph **out) {
  return epmoe::guarded([&] { epmoe::cuda::end(out); });
}

extern "C" epmoe_status epmoe_graph_replay(epmoe_graph *graph, void *stream) {
  return epmoe::guarded([&] {
    epmoe::cuda::refuse_in_capture("the replay of a graph");
    const epmoe::cuda::DeviceGuard guard(graph->device_id);
    const std::lock_guard<std::mutex> lock(graph->mutex);
    epmoe::cuda::expect_success(cudaGraphLaunch(graph->executable, static_cast<cudaStream_t>(stream)),
                                "launching a graph");
  });
}

extern "C" void epmoe_graph_free(epmoe_graph *graph) {
  if (graph == nullptr) return;
  delete graph;
}
