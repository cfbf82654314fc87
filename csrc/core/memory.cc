// Memory for tensors that callers own. Ops never allocate.
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/cuda.h"
#include "core/error.h"

namespace {

constexpr size_t kAlignment = 64;  // a cache line, and the widest CPU vector

bool on_gpu(DLDevice where) { return where.device_type == kDLCUDA; }

void require_known(DLDevice device) {
  if (device.device_type == kDLCPU || device.device_type == kDLCUDA || device.device_type == kDLCUDAHost) return;
  epmoe::fail(EPMOE_ERR_DEVICE, "device", "cpu, cuda or page-locked cpu memory",
              "DLPack device type " + std::to_string(device.device_type));
}

}  // namespace

extern "C" epmoe_status epmoe_alloc(DLDevice device, size_t nbytes, void **out) {
  return epmoe::guarded([&] {
    require_known(device);
    *out = nullptr;
    if (nbytes == 0) return;
    if (device.device_type != kDLCPU) {
      *out = epmoe::cuda::allocate(device, nbytes);
      return;
    }
    if (nbytes > SIZE_MAX - kAlignment) throw std::bad_alloc();
    *out = std::aligned_alloc(kAlignment, (nbytes + kAlignment - 1) / kAlignment * kAlignment);
    if (*out == nullptr) throw std::bad_alloc();
  });
}

extern "C" epmoe_status epmoe_free(DLDevice device, void *data) {
  return epmoe::guarded([&] {
    require_known(device);
    if (data == nullptr) return;
    if (device.device_type == kDLCPU)
      std::free(data);
    else
      epmoe::cuda::release(device, data);
  });
}

extern "C" epmoe_status epmoe_copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes,
                                   void *stream) {
  return epmoe::guarded([&] {
    if (nbytes == 0) return;
    if (on_gpu(dst_device) || on_gpu(src_device)) {
      epmoe::cuda::copy(dst, dst_device, src, src_device, nbytes, stream);
    } else {
      epmoe::cuda::refuse_in_capture("a copy on the host");
      std::memmove(dst, src, nbytes);
    }
  });
}
