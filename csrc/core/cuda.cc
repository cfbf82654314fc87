#include "core/cuda.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "core/error.h"
#include "core/exchange.h"
#include "core/op.h"

namespace epmoe::cuda {
namespace {

constexpr int kMaxDevices = 64;

// The first call on a device may come while the caller captures a graph; what is allocated then is not part of it.
class OutsideCapture {
 public:
  OutsideCapture() { expect_success(cudaThreadExchangeStreamCaptureMode(&mode_), "leaving capture mode"); }
  ~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

struct Device {
  std::once_flag once;
  Facts facts{};
  StatusWord *status = nullptr;
  cudaStream_t stream = nullptr;
};

Device &device_slot(int32_t device_id) {
  static Device devices[kMaxDevices];
  return devices[device_id];
}

int device_count() {
  int count = 0;
  expect_success(cudaGetDeviceCount(&count), "counting CUDA devices");
  return count < kMaxDevices ? count : kMaxDevices;
}

Device &device(int32_t device_id) {
  if (device_id < 0 || device_id >= kMaxDevices) {
    fail(EPMOE_ERR_DEVICE, "device", "a CUDA device of this machine", "cuda:" + std::to_string(device_id));
  }
  Device &slot = device_slot(device_id);
  std::call_once(slot.once, [&] {
    const int count = device_count();
    if (device_id >= count) {
      fail(EPMOE_ERR_DEVICE, "device", "cuda:0 to cuda:" + std::to_string(count - 1),
           "cuda:" + std::to_string(device_id), "Choose a device that epmoe doctor lists");
    }
    const OutsideCapture outside;
    const DeviceGuard guard(device_id);
    int cc_major = 0;
    int sm_count = 0;
    int l2_bytes = 0;
    expect_success(cudaDeviceGetAttribute(&cc_major, cudaDevAttrComputeCapabilityMajor, device_id),
                   "reading the compute capability");
    expect_success(cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device_id), "reading SM count");
    expect_success(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device_id), "reading L2 size");
    slot.facts = {cc_major, sm_count, l2_bytes};
    void *status = nullptr;
    expect_success(cudaHostAlloc(&status, sizeof(StatusWord), cudaHostAllocMapped | cudaHostAllocPortable),
                   "allocating the status word");
    std::memset(status, 0, sizeof(StatusWord));
    slot.status = static_cast<StatusWord *>(status);
    expect_success(cudaStreamCreateWithFlags(&slot.stream, cudaStreamNonBlocking), "creating a stream");
  });
  return slot;
}

bool on_gpu(DLDevice where) { return where.device_type == kDLCUDA; }

// Failures of a kernel after which CUDA answers every call of the process with the same error.
bool ends_context(cudaError_t error) {
  switch (error) {
    case cudaErrorAssert:
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

bool idle(void *stream) {
  const OutsideCapture outside;
  const cudaError_t state = cudaStreamQuery(static_cast<cudaStream_t>(stream));
  if (state == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  expect_success(state, "asking whether a stream is idle");
  return true;
}

}  // namespace

void expect_success(int code, const char *what) {
  if (code == cudaSuccess) return;
  const auto error = static_cast<cudaError_t>(code);
  cudaGetLastError();  // a failure that has been reported must not surface again at the next launch
  const std::string received = std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
  if (error == cudaErrorMemoryAllocation) {
    fail(EPMOE_ERR_OUT_OF_MEMORY, "", std::string("memory for ") + what, received, "Free tensors or use smaller ones");
  }
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    fail(EPMOE_ERR_NO_CUDA, "", "a CUDA device and a driver that fits", received, "Run epmoe doctor");
  }
  if (error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorStreamCaptureWrongThread) {
    fail(EPMOE_ERR_CAPTURE, "", std::string("something else than ") + what + " while a stream is captured", received,
         "Do it before or after the capture, which is lost");
  }
  if (ends_context(error)) {
    fail(
        EPMOE_ERR_CUDA_LOST, "", std::string("success in ") + what, received,
        "A kernel that ran earlier failed, of whichever library, and the CUDA context of this process is lost with all "
        "GPU memory: end the process and start another. compute-sanitizer, or CUDA_LAUNCH_BLOCKING=1, finds the "
        "kernel");
  }
  fail(EPMOE_ERR_CUDA, "", std::string("success in ") + what, received,
       "Earlier asynchronous work may be the cause: run under compute-sanitizer to find it");
}

DeviceGuard::DeviceGuard(int32_t device_id) {
  int current = 0;
  expect_success(cudaGetDevice(&current), "reading the current device");
  if (current == device_id) return;
  expect_success(cudaSetDevice(device_id), "selecting a device");
  previous_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

const Facts &facts(int32_t device_id) { return device(device_id).facts; }
StatusWord *status_word(int32_t device_id) { return device(device_id).status; }
void *own_stream(int32_t device_id) { return device(device_id).stream; }

void *allocate(DLDevice where, size_t nbytes) {
  void *data = nullptr;
  const OutsideCapture outside;
  if (on_gpu(where)) {
    device(where.device_id);
    const DeviceGuard guard(where.device_id);
    expect_success(cudaMalloc(&data, nbytes), "a tensor on cuda");
  } else {
    expect_success(cudaHostAlloc(&data, nbytes, cudaHostAllocPortable), "a page-locked tensor");
  }
  return data;
}

void release(DLDevice where, void *data) {
  const OutsideCapture outside;
  if (on_gpu(where)) {
    const DeviceGuard guard(where.device_id);
    expect_success(cudaFree(data), "freeing a tensor");
  } else {
    expect_success(cudaFreeHost(data), "freeing a page-locked tensor");
  }
}

void copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes, void *stream) {
  if (const Capture *capture = current_capture()) {
    const auto elsewhere = [&](DLDevice where) { return on_gpu(where) && where.device_id != capture->device_id; };
    if (elsewhere(dst_device) || elsewhere(src_device)) {
      fail(EPMOE_ERR_CAPTURE, "tensor", "tensors on the captured stream's GPU or in page-locked memory",
           "one on another GPU", "Copy before or after the capture");
    }
    if (stream != capture->stream || dst_device.device_type == kDLCPU || src_device.device_type == kDLCPU) {
      fail(EPMOE_ERR_CAPTURE, "tensor", "a copy on the captured stream, of tensors on GPUs or in page-locked memory",
           stream != capture->stream ? "one on another stream" : "one of pageable memory",
           "Copy before or after the capture, or make the host's tensor pinned");
    }
  }
  const DeviceGuard guard(on_gpu(dst_device) ? dst_device.device_id : src_device.device_id);
  expect_success(cudaMemcpyAsync(dst, src, nbytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
                 "copying a tensor");
}

void take_status(int32_t device_id) {
  volatile StatusWord *word = device(device_id).status;
  if (word->claim == 0) return;
  const OpEntry *entry = entry_at(word->op_index);
  Failure failure;
  failure.status = EPMOE_ERR_INDEX_OUT_OF_RANGE;
  failure.op = entry ? entry->op->name : "";
  failure.argument = entry ? entry->op->params[static_cast<size_t>(word->param)].name : "";
  failure.expected = "an index in [" + std::to_string(word->begin) + ", " + std::to_string(word->end) + ")";
  failure.received =
      std::to_string(word->value) + " at token " + std::to_string(word->token) + ", slot " + std::to_string(word->slot);
  failure.hint = "The slot was skipped and the rest computed: the output of that token is incomplete";
  word->claim = 0;
  throw failure;
}

}  // namespace epmoe::cuda

using epmoe::fail;
using epmoe::guarded;
using epmoe::cuda::DeviceGuard;
using epmoe::cuda::expect_success;

extern "C" int32_t epmoe_cuda_compiled(void) { return 1; }

extern "C" int32_t epmoe_cuda_device_count(void) {
  int32_t count = 0;
  guarded([&] { count = epmoe::cuda::device_count(); });
  return count;
}

extern "C" epmoe_status epmoe_device_query(int32_t device_id, epmoe_device_facts *out) {
  return guarded([&] {
    epmoe::cuda::device(device_id);
    cudaDeviceProp properties{};
    expect_success(cudaGetDeviceProperties(&properties, device_id), "reading device properties");
    *out = {};
    std::snprintf(out->name, sizeof out->name, "%.*s", static_cast<int>(sizeof out->name) - 1, properties.name);
    out->cc_major = properties.major;
    out->cc_minor = properties.minor;
    out->sm_count = properties.multiProcessorCount;
    out->l2_bytes = properties.l2CacheSize;
    out->total_bytes = static_cast<int64_t>(properties.totalGlobalMem);
    expect_success(cudaDriverGetVersion(&out->driver_version), "reading the driver version");
    expect_success(cudaRuntimeGetVersion(&out->runtime_version), "reading the runtime version");
  });
}

extern "C" epmoe_status epmoe_peer_access(int32_t device_id, int32_t peer_id, int32_t *out) {
  return guarded([&] {
    int access = 0;
    expect_success(cudaDeviceCanAccessPeer(&access, device_id, peer_id), "asking for peer access");
    *out = access;
  });
}

extern "C" epmoe_status epmoe_stream_create(int32_t device_id, void **out) {
  return guarded([&] {
    epmoe::cuda::device(device_id);
    const DeviceGuard guard(device_id);
    const epmoe::cuda::OutsideCapture outside;
    cudaStream_t stream = nullptr;
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    *out = stream;
  });
}

extern "C" epmoe_status epmoe_stream_destroy(int32_t device_id, void *stream) {
  return guarded([&] {
    const DeviceGuard guard(device_id);
    expect_success(cudaStreamDestroy(static_cast<cudaStream_t>(stream)), "destroying a stream");
  });
}

extern "C" epmoe_status epmoe_stream_own(int32_t device_id, void **out) {
  return guarded([&] { *out = epmoe::cuda::own_stream(device_id); });
}

extern "C" epmoe_status epmoe_stream_foreign(int32_t device_id, void **out) {
  return guarded([&] { *out = epmoe::foreign_stream(device_id); });
}

extern "C" epmoe_status epmoe_stream_wait(int32_t device_id, void *stream, int32_t awaited_device_id, void *awaited) {
  return guarded([&] {
    using epmoe::cuda::Captured;
    if (stream == awaited && device_id == awaited_device_id) return;
    const Captured which = epmoe::cuda::captured(device_id, stream, awaited_device_id, awaited);
    const DeviceGuard guard(awaited_device_id);
    if (which == Captured::kFirst && epmoe::cuda::idle(awaited)) return;
    if (which == Captured::kFirst || which == Captured::kSecond) {
      fail(EPMOE_ERR_CAPTURE, "stream", "work on one captured stream, or after all earlier work on its tensors",
           which == Captured::kFirst ? "a tensor with work under way on a stream that is not captured"
                                     : "a tensor that is being captured, used on a stream that is not",
           which == Captured::kFirst ? "Synchronize that stream before the capture" : "Wait for the capture's end");
    }
    cudaEvent_t event = nullptr;
    expect_success(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    const int recorded = cudaEventRecord(event, static_cast<cudaStream_t>(awaited));
    int waited = cudaSuccess;
    if (recorded == cudaSuccess) {
      const DeviceGuard waiting(device_id);
      waited = cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event, 0);
    }
    cudaEventDestroy(event);  // released by CUDA once it has been reached
    expect_success(recorded, "recording an event");
    expect_success(waited, "waiting for an event");
  });
}

extern "C" epmoe_status epmoe_stream_synchronize(int32_t device_id, void *stream) {
  return guarded([&] {
    epmoe::cuda::device(device_id);
    const DeviceGuard guard(device_id);
    // Asked of CUDA, waiting for a stream under capture would spoil the capture.
    if (epmoe::cuda::is_captured(device_id, stream)) {
      fail(EPMOE_ERR_CAPTURE, "stream", "a stream that runs", "one that is being captured",
           "Wait after the capture, for a replay of the graph");
    }
    epmoe::cuda::refuse_in_capture("waiting for a stream");
    expect_success(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for a stream");
    epmoe::cuda::take_status(device_id);
  });
}

extern "C" epmoe_status epmoe_check(int32_t device_id) {
  return guarded([&] { epmoe::cuda::take_status(device_id); });
}
