#include "node/cpython.h"

#include <dlfcn.h>

namespace epmoe::node {
namespace {

template <typename Pointer>
bool resolve(Pointer &pointer, const char *name) {
  pointer = reinterpret_cast<Pointer>(dlsym(RTLD_DEFAULT, name));
  return pointer != nullptr;
}

}  // namespace

CPython py;

const char *find_cpython() {
#define FUNCTION(result, name, parameters) \
  if (!resolve(py.name, "Py_" #name) && !resolve(py.name, "Py" #name)) return "Py" #name;
  EPMOE_CPYTHON(FUNCTION)
#undef FUNCTION
  return resolve(py.None, "_Py_NoneStruct") ? nullptr : "_Py_NoneStruct";
}

bool python_is_alive() { return py.IsInitialized != nullptr && py.IsInitialized() != 0; }

Gil::Gil(bool take) : held_(take && python_is_alive()) {
  if (held_) state_ = py.GILState_Ensure();
}

Gil::~Gil() {
  if (held_) py.GILState_Release(state_);
}

}  // namespace epmoe::node
