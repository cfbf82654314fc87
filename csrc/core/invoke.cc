// One path for every op: check, leave early when there is nothing to write, choose the stream, run.
#include <memory>
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

// What only a look at all arguments can tell.
void check_whole(const OpEntry &entry, const Call &call) {
  if (entry.op->validate != nullptr) entry.op->validate(call);
  if (call.device.device_type == kDLCPU || entry.run_cuda != nullptr) return;
  fail(EPMOE_ERR_NO_CUDA, "", "CPU tensors: this build of epmoe has no CUDA kernels", "tensors on cuda",
       "Install the CUDA toolkit and build epmoe again, or move the tensors to the CPU");
}

void *choose_stream(int32_t device_id, bool foreign, int32_t stream_mode, void *stream) {
  if (const cuda::Capture *capture = cuda::current_capture()) {
    if (device_id != capture->device_id || (stream_mode == EPMOE_STREAM_GIVEN && stream != capture->stream)) {
      fail(EPMOE_ERR_CAPTURE, "stream", "the captured stream, of cuda:" + std::to_string(capture->device_id),
           "another stream, of cuda:" + std::to_string(device_id),
           "Give no stream inside a capture, or run the op before or after it");
    }
    return capture->stream;
  }
  if (stream_mode == EPMOE_STREAM_GIVEN) return stream;
  return foreign ? foreign_stream(device_id) : cuda::own_stream(device_id);
}

void run(const OpEntry &entry, Call &call, bool foreign, int32_t stream_mode, void *stream) {
  if (call.device.device_type == kDLCPU) {
    cuda::refuse_in_capture("an op on the CPU");
    entry.op->run_cpu(call);
    return;
  }
  const cuda::DeviceGuard guard(call.device.device_id);
  call.stream = choose_stream(call.device.device_id, foreign, stream_mode, stream);
  entry.run_cuda(call);
}

const OpEntry &entry_of(const epmoe_op_info *op) {
  const OpEntry *entry = find_entry(op);
  if (entry == nullptr) {
    fail(EPMOE_ERR_UNKNOWN_OP, "", "an op of this library", "a pointer it does not know", "Use epmoe_op_find()");
  }
  return *entry;
}

// Failures inside name the op.
template <typename Body>
void naming(const OpEntry &entry, const Body &body) {
  try {
    body();
  } catch (Failure &failure) {
    failure.op = entry.op->name;
    throw;
  }
}

}  // namespace
}  // namespace epmoe

extern "C" int32_t epmoe_abi_version(void) { return EPMOE_ABI_VERSION; }

extern "C" const char *epmoe_version(void) { return EPMOE_VERSION; }

extern "C" epmoe_status epmoe_invoke(const epmoe_op_info *op, const epmoe_value *values, int32_t n_values,
                                     int32_t stream_mode, void *stream) {
  using namespace epmoe;
  return guarded([&] {
    const OpEntry &entry = entry_of(op);
    naming(entry, [&] {
      Call call;
      bool foreign = false;
      check_call(entry, values, n_values, &call, &foreign);
      check_whole(entry, call);
      if (!writes_nothing(call)) run(entry, call, foreign, stream_mode, stream);
    });
  });
}

struct epmoe_prepared {
  epmoe::Call call;
  bool foreign = false;
  bool idle = false;  // there is nothing to write
};

extern "C" epmoe_status epmoe_prepare(const epmoe_op_info *op, const epmoe_value *values, int32_t n_values,
                                      epmoe_prepared **out) {
  using namespace epmoe;
  return guarded([&] {
    const OpEntry &entry = entry_of(op);
    auto prepared = std::make_unique<epmoe_prepared>();
    naming(entry, [&] {
      check_call(entry, values, n_values, &prepared->call, &prepared->foreign);
      check_whole(entry, prepared->call);
    });
    prepared->idle = writes_nothing(prepared->call);
    // Shapes and strides belong to the caller, who may let go of them; kernels know sizes by the axes.
    for (DLTensor &tensor : prepared->call.tensors) tensor.shape = tensor.strides = nullptr;
    *out = prepared.release();
  });
}

extern "C" epmoe_status epmoe_prepared_run(const epmoe_prepared *prepared, int32_t stream_mode, void *stream) {
  using namespace epmoe;
  if (prepared->idle) return EPMOE_OK;
  return guarded([&] {
    Call call = prepared->call;  // a call of its own for each thread
    naming(*call.entry, [&] { run(*call.entry, call, prepared->foreign, stream_mode, stream); });
  });
}

extern "C" void epmoe_prepared_free(epmoe_prepared *prepared) { delete prepared; }
