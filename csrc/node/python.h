// CPython as seen from the addon: a few functions of its stable ABI, found by name in the interpreter that pymport has
// loaded. The addon neither links against Python nor includes its headers.
#pragma once

#include "epmoe.h"

namespace epmoe::node {

using PyObject = void;  // opaque here

// True between attaching to an interpreter and its finalisation.
bool python_is_alive();

// Holds the GIL for its lifetime; does nothing when Python is not attached.
class Gil {
 public:
  explicit Gil(bool take = true);
  ~Gil();
  Gil(const Gil &) = delete;
  Gil &operator=(const Gil &) = delete;

 private:
  bool held_;
  int state_ = 0;
};

// Why a Python object is no tensor an op can take; `code` is nullptr when it is one.
struct Refusal {
  const char *code = nullptr;
  const char *received = "";
  const char *hint = "";
};
// The GIL must be held.
Refusal refuse_object(PyObject *object);

// Describes a tensor object without taking it over: valid while the object lives and nobody resizes it. The GIL must be
// held.
Refusal read_object(PyObject *object, DLTensor *out);

// What makes `object` impossible to export ("a sparse tensor"), found after an export failed. The GIL must be held.
const char *name_unsupported(PyObject *object);

class Environment;
// Has the graph that is being captured keep the memory of a tensor that read_object() could read. The GIL must be held.
void record_object(Environment &environment, PyObject *object);

bool has_exchange();

}  // namespace epmoe::node
