// Failures inside the library: thrown by checks, caught at the contract, kept per thread for epmoe_last_error().
#pragma once

#include <exception>
#include <new>
#include <string>
#include <utility>

#include "epmoe.h"

namespace epmoe {

struct Failure {
  epmoe_status status = EPMOE_ERR_INTERNAL;
  std::string argument;
  std::string expected;
  std::string received;
  std::string hint;
  std::string op;
};

[[noreturn]] void fail(epmoe_status status, std::string argument, std::string expected, std::string received,
                       std::string hint = "");

// Remembers `failure` as this thread's last error and returns its status.
epmoe_status remember(Failure failure);

// Runs `body` and turns whatever it throws into a status. Every function of the contract that can fail is wrapped so.
template <typename Body>
epmoe_status guarded(const Body &body) {
  try {
    body();
    return EPMOE_OK;
  } catch (Failure &failure) {
    return remember(std::move(failure));
  } catch (const std::bad_alloc &) {
    Failure failure;
    failure.status = EPMOE_ERR_OUT_OF_MEMORY;
    failure.expected = "enough host memory";
    failure.received = "none left";
    return remember(std::move(failure));
  } catch (const std::exception &error) {
    Failure failure;
    failure.received = error.what();
    return remember(std::move(failure));
  }
}

}  // namespace epmoe
