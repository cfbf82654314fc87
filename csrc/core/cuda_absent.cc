// The CUDA half of the contract in a build without the CUDA toolkit: everything says so.
#include "core/cuda.h"
#include "core/error.h"

namespace epmoe::cuda {
namespace {

[[noreturn]] void absent() {
  fail(EPMOE_ERR_NO_CUDA, "device", "the CPU: this build of epmoe has no CUDA", "cuda",
       "Install the CUDA toolkit (nvcc) and build epmoe again");
}

epmoe_status answer_absent() {
  return guarded([] { absent(); });
}

}  // namespace

DeviceGuard::DeviceGuard(int32_t) { absent(); }
DeviceGuard::~DeviceGuard() = default;
void *own_stream(int32_t) { absent(); }
void *allocate(DLDevice, size_t) { absent(); }
void release(DLDevice, void *) { absent(); }
void copy(void *, DLDevice, const void *, DLDevice, size_t, void *) { absent(); }
const Capture *current_capture() { return nullptr; }
void refuse_in_capture(const char *) {}

}  // namespace epmoe::cuda

using epmoe::cuda::answer_absent;

extern "C" int32_t epmoe_cuda_compiled(void) { return 0; }
extern "C" int32_t epmoe_cuda_device_count(void) { return 0; }
extern "C" epmoe_status epmoe_device_query(int32_t, epmoe_device_facts *) { return answer_absent(); }
extern "C" epmoe_status epmoe_peer_access(int32_t, int32_t, int32_t *) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_create(int32_t, void **) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_destroy(int32_t, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_own(int32_t, void **) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_foreign(int32_t, void **) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_wait(int32_t, void *, int32_t, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_synchronize(int32_t, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_check(int32_t) { return answer_absent(); }
extern "C" epmoe_status epmoe_event_create(int32_t, int32_t, void **) { return answer_absent(); }
extern "C" void epmoe_event_destroy(int32_t, void *) {}
extern "C" epmoe_status epmoe_event_record(int32_t, void *, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_event_query(int32_t, void *, int32_t *) { return answer_absent(); }
extern "C" epmoe_status epmoe_event_synchronize(int32_t, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_event_elapsed(int32_t, void *, void *, double *) { return answer_absent(); }
extern "C" epmoe_status epmoe_stream_wait_event(int32_t, void *, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_capture_begin(int32_t, void *) { return answer_absent(); }
extern "C" epmoe_status epmoe_capture_end(epmoe_graph **) { return answer_absent(); }
extern "C" epmoe_status epmoe_graph_replay(epmoe_graph *, void *) { return answer_absent(); }
extern "C" void epmoe_graph_free(epmoe_graph *) {}
