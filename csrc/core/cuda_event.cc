// Events: points in a stream's work, to wait for and to time between.
#include <cuda_runtime_api.h>

#include "core/cuda.h"
#include "core/error.h"

namespace {

using epmoe::guarded;
using epmoe::cuda::DeviceGuard;
using epmoe::cuda::expect_success;

cudaEvent_t as_event(void *event) { return static_cast<cudaEvent_t>(event); }

// An event recorded inside a capture is part of the graph: nobody outside could wait for it.
void require_running(int32_t device_id, void *stream) {
  if (!epmoe::cuda::is_captured(device_id, stream)) return;
  epmoe::fail(EPMOE_ERR_CAPTURE, "stream", "a stream that runs", "one that is being captured",
              "Record and wait for events outside the capture, around replays of the graph");
}

}  // namespace

extern "C" epmoe_status epmoe_event_create(int32_t device_id, int32_t timed, void **out) {
  return guarded([&] {
    epmoe::cuda::own_stream(device_id);  // names a device that is not there
    const DeviceGuard guard(device_id);
    cudaEvent_t event = nullptr;
    // Waiters sleep rather than spin: the thread may be one of few.
    const unsigned flags = cudaEventBlockingSync | (timed != 0 ? cudaEventDefault : cudaEventDisableTiming);
    expect_success(cudaEventCreateWithFlags(&event, flags), "creating an event");
    *out = event;
  });
}

extern "C" void epmoe_event_destroy(int32_t device_id, void *event) {
  guarded([&] {
    const DeviceGuard guard(device_id);
    cudaEventDestroy(as_event(event));
  });
}

extern "C" epmoe_status epmoe_event_record(int32_t device_id, void *event, void *stream) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    require_running(device_id, stream);
    expect_success(cudaEventRecord(as_event(event), static_cast<cudaStream_t>(stream)), "recording an event");
  });
}

extern "C" epmoe_status epmoe_event_query(int32_t device_id, void *event, int32_t *out) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    const cudaError_t state = cudaEventQuery(as_event(event));
    *out = state == cudaSuccess;
    if (state == cudaErrorNotReady) {
      cudaGetLastError();
      return;
    }
    expect_success(state, "asking whether an event is done");
  });
}

extern "C" epmoe_status epmoe_event_synchronize(int32_t device_id, void *event) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    epmoe::cuda::refuse_in_capture("waiting for an event");
    expect_success(cudaEventSynchronize(as_event(event)), "waiting for an event");
    epmoe::cuda::take_status(device_id);
  });
}

extern "C" epmoe_status epmoe_event_elapsed(int32_t device_id, void *begin, void *end, double *out) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    float milliseconds = 0;
    const cudaError_t code = cudaEventElapsedTime(&milliseconds, as_event(begin), as_event(end));
    if (code == cudaErrorNotReady || code == cudaErrorInvalidResourceHandle) {
      cudaGetLastError();
      epmoe::fail(EPMOE_ERR_VALUE, "event", "two events of one device that measure time and are done",
                  code == cudaErrorNotReady ? "one that is not done" : "one that measures no time, or was not recorded",
                  code == cudaErrorNotReady ? "Wait for the later one first" : "Create events with timing");
    }
    expect_success(code, "measuring the time between events");
    *out = milliseconds;
  });
}

extern "C" epmoe_status epmoe_stream_wait_event(int32_t device_id, void *stream, void *event) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    require_running(device_id, stream);
    expect_success(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), as_event(event), 0), "waiting for an event");
  });
}
