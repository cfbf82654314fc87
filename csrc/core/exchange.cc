#include "core/exchange.h"

#include <atomic>
#include <string>

#include "core/error.h"

namespace epmoe {
namespace {

std::atomic<const DLPackExchangeAPI *> exchange{nullptr};

}  // namespace

void read_object(void *object, const char *argument, DLTensor *out) {
  const DLPackExchangeAPI *api = exchange.load(std::memory_order_acquire);
  if (api == nullptr) {
    fail(EPMOE_ERR_NOT_A_TENSOR, argument, "a tensor", "an object of a framework without an exchange table",
         "Call epmoe_set_exchange() first");
  }
  if (object == nullptr || api->dltensor_from_py_object_no_sync(object, out) != 0) {
    // The reason is pending in the framework's own runtime, where only the caller can read it.
    fail(EPMOE_ERR_UNSUPPORTED_TENSOR, argument, "a dense tensor with memory of its own",
         "a tensor that its framework cannot describe", "Make it dense and contiguous first");
  }
}

void *foreign_stream(int32_t device_id) {
  const DLPackExchangeAPI *api = exchange.load(std::memory_order_acquire);
  void *stream = nullptr;
  if (api == nullptr || api->current_work_stream(kDLCUDA, device_id, &stream) != 0) {
    fail(EPMOE_ERR_VALUE, "stream", "a framework that tells its current stream",
         api == nullptr ? "no exchange table" : "a failure of the framework", "Pass the stream explicitly");
  }
  return stream;
}

}  // namespace epmoe

extern "C" epmoe_status epmoe_set_exchange(const DLPackExchangeAPI *api) {
  return epmoe::guarded([&] {
    if (api != nullptr && api->header.version.major != DLPACK_ABI_MAJOR) {
      epmoe::fail(EPMOE_ERR_VALUE, "api", "DLPack major version " + std::to_string(DLPACK_ABI_MAJOR),
                  std::to_string(api->header.version.major), "Update epmoe or the framework");
    }
    epmoe::exchange.store(api, std::memory_order_release);
  });
}
