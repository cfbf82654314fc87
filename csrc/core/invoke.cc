// One path for every op: check, leave early when there is nothing to write, choose the stream, run.
#include <string>

#include "core/check.h"
#include "core/cuda.h"
#include "core/error.h"
#include "core/exchange.h"
#include "core/op.h"

namespace epmoe {
namespace {

bool writes_nothing(const Call &call) {
  const auto &params = call.entry->op->params;
  for (size_t i = 0; i < params.size(); ++i) {
    if (!call.present[i] || params[i].kind != EPMOE_KIND_TENSOR || params[i].role != EPMOE_ROLE_OUT) continue;
    int64_t count = 1;
    for (int32_t axis = 0; axis < call.tensors[i].ndim; ++axis) count *= call.tensors[i].shape[axis];
    if (count != 0) return false;
  }
  return true;
}

void run(const OpEntry &entry, Call &call, bool foreign, int32_t stream_mode, void *stream) {
  if (entry.op->validate != nullptr) entry.op->validate(call);
  if (writes_nothing(call)) return;
  if (call.device.device_type == kDLCPU) {
    entry.op->run_cpu(call);
    return;
  }
  if (entry.run_cuda == nullptr) {
    fail(EPMOE_ERR_NO_CUDA, "", "CPU tensors: this build of epmoe has no CUDA kernels", "tensors on cuda",
         "Install the CUDA toolkit and build epmoe again, or move the tensors to the CPU");
  }
  const cuda::DeviceGuard guard(call.device.device_id);
  if (stream_mode == EPMOE_STREAM_GIVEN)
    call.stream = stream;
  else
    call.stream = foreign ? foreign_stream(call.device.device_id) : cuda::own_stream(call.device.device_id);
  entry.run_cuda(call);
}

}  // namespace
}  // namespace epmoe

extern "C" int32_t epmoe_abi_version(void) { return EPMOE_ABI_VERSION; }

extern "C" const char *epmoe_version(void) { return EPMOE_VERSION; }

extern "C" epmoe_status epmoe_invoke(const epmoe_op_info *op, const epmoe_value *values, int32_t n_values,
                                     int32_t stream_mode, void *stream) {
  using namespace epmoe;
  return guarded([&] {
    const OpEntry *entry = find_entry(op);
    if (entry == nullptr) {
      fail(EPMOE_ERR_UNKNOWN_OP, "", "an op of this library", "a pointer it does not know", "Use epmoe_op_find()");
    }
    Call call;
    bool foreign = false;
    try {
      check_call(*entry, values, n_values, &call, &foreign);
      run(*entry, call, foreign, stream_mode, stream);
    } catch (Failure &failure) {
      failure.op = entry->op->name;
      throw;
    }
  });
}
