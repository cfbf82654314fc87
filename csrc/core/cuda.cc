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
  if (on_gpu(where)) {
    const DeviceGuard guard(where.device_id);
    expect_success(cudaFree(data), "freeing a tensor");
  } else {
    expect_success(cudaFreeHost(data), "freeing a page-locked tensor");
  }
}

void copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes, void *stream) {
  const DeviceGuard guard(on_gpu(dst_device) ? dst_device.device_id : src_device.device_id);
  expect_success(cudaMemcpyAsync(dst, src, nbytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
                 "copying a tensor");
}

namespace {

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

}  // namespace
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

extern "C" epmoe_status epmoe_stream_wait(int32_t device_id, void *stream, void *awaited) {
  return guarded([&] {
    if (stream == awaited) return;
    const DeviceGuard guard(device_id);
    cudaEvent_t event = nullptr;
    expect_success(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
    const int recorded = cudaEventRecord(event, static_cast<cudaStream_t>(awaited));
    const int waited = recorded == cudaSuccess ? cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), event, 0) : 0;
    cudaEventDestroy(event);  // released by CUDA once it has been reached
    expect_success(recorded, "recording an event");
    expect_success(waited, "waiting for an event");
  });
}

extern "C" epmoe_status epmoe_stream_synchronize(int32_t device_id, void *stream) {
  return guarded([&] {
    epmoe::cuda::device(device_id);
    const DeviceGuard guard(device_id);
    expect_success(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), "waiting for a stream");
    epmoe::cuda::take_status(device_id);
  });
}

extern "C" epmoe_status epmoe_check(int32_t device_id) {
  return guarded([&] { epmoe::cuda::take_status(device_id); });
}
