#include "core/error.h"

#include <utility>

namespace epmoe {
namespace {

constexpr const char *kCodes[EPMOE_STATUS_COUNT] = {
    "OK",
    "ERR_UNKNOWN_OP",
    "ERR_MISSING_ARGUMENT",
    "ERR_UNEXPECTED_ARGUMENT",
    "ERR_NOT_A_TENSOR",
    "ERR_UNSUPPORTED_TENSOR",
    "ERR_DTYPE",
    "ERR_RANK",
    "ERR_SHAPE",
    "ERR_NOT_CONTIGUOUS",
    "ERR_MISALIGNED",
    "ERR_DEVICE",
    "ERR_OVERLAP",
    "ERR_READ_ONLY",
    "ERR_VALUE",
    "ERR_INDEX_OUT_OF_RANGE",
    "ERR_CAPTURE",
    "ERR_NO_CUDA",
    "ERR_CUDA",
    "ERR_CUDA_LOST",
    "ERR_OUT_OF_MEMORY",
    "ERR_INTERNAL",
};

struct LastError {
  Failure failure;
  std::string message;
  epmoe_error view{};
};

LastError &last_error() {
  thread_local LastError error;
  return error;
}

std::string compose(const Failure &failure) {
  std::string text;
  if (!failure.op.empty()) text += failure.op + ": ";
  if (!failure.argument.empty()) text += failure.argument + ": ";
  if (!failure.expected.empty()) text += "expected " + failure.expected + ", ";
  text += failure.expected.empty() ? failure.received : "received " + failure.received;
  if (!failure.hint.empty()) text += ". " + failure.hint;
  if (failure.status == EPMOE_ERR_INTERNAL) text += ". This is a bug in epmoe: please report it with this message";
  return text;
}

}  // namespace

void fail(epmoe_status status, std::string argument, std::string expected, std::string received, std::string hint) {
  Failure failure;
  failure.status = status;
  failure.argument = std::move(argument);
  failure.expected = std::move(expected);
  failure.received = std::move(received);
  failure.hint = std::move(hint);
  throw failure;
}

epmoe_status remember(Failure failure) {
  LastError &error = last_error();
  error.failure = std::move(failure);
  error.message = compose(error.failure);
  const Failure &f = error.failure;
  error.view = {f.status,           f.op.c_str(),   f.argument.c_str(),   f.expected.c_str(),
                f.received.c_str(), f.hint.c_str(), error.message.c_str()};
  return f.status;
}

}  // namespace epmoe

extern "C" const char *epmoe_status_code(epmoe_status status) {
  return status >= 0 && status < EPMOE_STATUS_COUNT ? epmoe::kCodes[status] : "ERR_INTERNAL";
}

extern "C" const epmoe_error *epmoe_last_error(void) {
  epmoe::LastError &error = epmoe::last_error();
  if (error.view.message == nullptr) epmoe::remember({EPMOE_OK, "", "", "no error on this thread", "", ""});
  return &error.view;
}
