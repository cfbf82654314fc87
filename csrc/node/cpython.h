// The functions of CPython that the addon uses, found by name in the interpreter that pymport has loaded: the addon
// neither links against Python nor includes its headers. All but IsInitialized and GILState_Ensure need the GIL.
#pragma once

#include <cstddef>

namespace epmoe::node {

using PyObject = void;  // opaque here

// Result, name without its prefix Py or Py_, parameters. References: "new" results are the caller's.
#define EPMOE_CPYTHON(FUNCTION)                                                                       \
  FUNCTION(int, GILState_Ensure, ())                                                                  \
  FUNCTION(void, GILState_Release, (int))                                                             \
  FUNCTION(void, IncRef, (PyObject *))                                                                \
  FUNCTION(void, DecRef, (PyObject *))                                                                \
  FUNCTION(PyObject *, Object_Type, (PyObject *))                   /* new */                         \
  FUNCTION(PyObject *, Object_GetAttr, (PyObject *, PyObject *))    /* new */                         \
  FUNCTION(PyObject *, Object_CallObject, (PyObject *, PyObject *)) /* new */                         \
  FUNCTION(int, Object_IsTrue, (PyObject *))                                                          \
  FUNCTION(int, Type_IsSubtype, (PyObject *, PyObject *))                                             \
  FUNCTION(PyObject *, Unicode_InternFromString, (const char *))                            /* new */ \
  FUNCTION(PyObject *, Unicode_DecodeUTF16, (const char *, ptrdiff_t, const char *, int *)) /* new */ \
  FUNCTION(const char *, Unicode_AsUTF8AndSize, (PyObject *, ptrdiff_t *))                            \
  FUNCTION(PyObject *, Long_FromLongLong, (long long)) /* new */                                      \
  FUNCTION(long long, Long_AsLongLong, (PyObject *))                                                  \
  FUNCTION(PyObject *, Long_FromString, (const char *, char **, int)) /* new */                       \
  FUNCTION(PyObject *, Float_FromDouble, (double))                    /* new */                       \
  FUNCTION(PyObject *, Bool_FromLong, (long))                         /* new */                       \
  FUNCTION(PyObject *, List_New, (ptrdiff_t))                         /* new */                       \
  FUNCTION(int, List_SetItem, (PyObject *, ptrdiff_t, PyObject *))    /* takes the item */            \
  FUNCTION(int, List_Append, (PyObject *, PyObject *))                                                \
  FUNCTION(PyObject *, Dict_New, ()) /* new */                                                        \
  FUNCTION(int, Dict_SetItem, (PyObject *, PyObject *, PyObject *))                                   \
  FUNCTION(PyObject *, Tuple_New, (ptrdiff_t))                      /* new */                         \
  FUNCTION(int, Tuple_SetItem, (PyObject *, ptrdiff_t, PyObject *)) /* takes the item */              \
  FUNCTION(PyObject *, Tuple_GetItem, (PyObject *, ptrdiff_t))                                        \
  FUNCTION(void, Err_Clear, ())                                                                       \
  FUNCTION(void, Err_Fetch, (PyObject **, PyObject **, PyObject **)) /* new */                        \
  FUNCTION(void, Err_NormalizeException, (PyObject **, PyObject **, PyObject **))                     \
  FUNCTION(void *, Capsule_GetPointer, (PyObject *, const char *))                                    \
  FUNCTION(int, Capsule_IsValid, (PyObject *, const char *))                                          \
  FUNCTION(int, Capsule_SetName, (PyObject *, const char *))                                          \
  FUNCTION(PyObject *, Capsule_New, (void *, const char *, void (*)(PyObject *))) /* new */           \
  FUNCTION(int, IsInitialized, ()) /* last: threads that see it find the others */

struct CPython {
#define FUNCTION(result, name, parameters) result(*name) parameters = nullptr;
  EPMOE_CPYTHON(FUNCTION)
#undef FUNCTION
  PyObject *None = nullptr;
};
// One interpreter a process, so one table for all environments.
extern CPython py;

// Fills the table; the name of what is missing, or nullptr.
const char *find_cpython();

// True between the start of the interpreter and its finalisation.
bool python_is_alive();

// Holds the GIL for its lifetime; does nothing when Python does not run.
class Gil {
 public:
  explicit Gil(bool take = true);
  ~Gil();
  Gil(const Gil &) = delete;
  Gil &operator=(const Gil &) = delete;
  bool held() const { return held_; }

 private:
  bool held_;
  int state_ = 0;
};

// A reference of one's own. The GIL must be held.
class Owned {
 public:
  explicit Owned(PyObject *object = nullptr) : object_(object) {}
  ~Owned() {
    if (object_ != nullptr) py.DecRef(object_);
  }
  Owned(const Owned &) = delete;
  Owned &operator=(const Owned &) = delete;
  PyObject *get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  // Gives the reference up to the caller.
  PyObject *release() {
    PyObject *object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject *object_;
};

}  // namespace epmoe::node
