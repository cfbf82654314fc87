// Tensors of torch as seen from the addon.
#pragma once

#include "epmoe.h"
#include "node/cpython.h"

namespace epmoe::node {

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
