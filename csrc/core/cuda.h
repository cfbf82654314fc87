// What the library needs of CUDA beside kernels. Without a CUDA toolkit, cuda_absent.cc stands in for cuda.cc.
#pragma once

#include <cstdint>

#include "epmoe.h"

namespace epmoe::cuda {

// Where kernels report an index they skipped. Lives in page-locked memory that host and device both see; `claim` lets
// exactly one offender write, and the host reads it after the stream has been waited for.
struct StatusWord {
  unsigned long long claim;
  int32_t op_index;
  int32_t param;
  int64_t token;
  int64_t slot;
  int64_t value;
  int64_t begin, end;  // what was allowed: [begin, end)
};

// Makes `device_id` current and restores the previous device.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device_id);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard &) = delete;
  DeviceGuard &operator=(const DeviceGuard &) = delete;

 private:
  int previous_ = -1;
};

// Facts a launch needs, read once per device.
struct Facts {
  int cc_major;
  int sm_count;
  int64_t l2_bytes;
};

const Facts &facts(int32_t device_id);
StatusWord *status_word(int32_t device_id);
void *own_stream(int32_t device_id);

// Memory on the GPU or page-locked on the host, and copies that touch the GPU.
void *allocate(DLDevice where, size_t nbytes);
void release(DLDevice where, void *data);
void copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes, void *stream);

// Throws Failure unless `code` is cudaSuccess.
void expect_success(int code, const char *what);

}  // namespace epmoe::cuda
