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
// Throws the index error that kernels have reported on the device, if any, and clears it.
void take_status(int32_t device_id);

// Memory on the GPU or page-locked on the host, and copies that touch the GPU.
void *allocate(DLDevice where, size_t nbytes);
void release(DLDevice where, void *data);
void copy(void *dst, DLDevice dst_device, const void *src, DLDevice src_device, size_t nbytes, void *stream);

// The capture of a graph that this thread has begun, or nullptr.
struct Capture {
  int32_t device_id;
  void *stream;
};
const Capture *current_capture();
// Throws when this thread captures: `what` would be done now, and not again at a replay.
void refuse_in_capture(const char *what);
// Which of two streams is being captured, by whomever: none, both into one graph, the first alone, or the second alone
// or into another graph.
enum class Captured { kNone, kTogether, kFirst, kSecond };
Captured captured(int32_t first_device, void *first, int32_t second_device, void *second);
bool is_captured(int32_t device_id, void *stream);

// Throws Failure unless `code` is cudaSuccess.
void expect_success(int code, const char *what);

}  // namespace epmoe::cuda
