// Calls of torch's Python functions from inside an op, for what the stable ABI has no entrance to: the GIL, references
// that count themselves, tensors both ways, and an error's text.
#pragma once

#include <Python.h>

#include <string>
#include <utility>

#include "tensor.h"

namespace sgl_comm::python {

// Holds the GIL, which every other name here needs. Make it first, so that it goes last.
class Gil {
 public:
  Gil() : state_(PyGILState_Ensure()) {}
  Gil(const Gil&) = delete;
  Gil& operator=(const Gil&) = delete;
  ~Gil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// Owns a reference. Null where the call that made it failed; then Python's error is set, and stays so through attr().
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&&) = delete;
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }
  Ref attr(const char* name) const { return Ref(object_ != nullptr ? PyObject_GetAttrString(object_, name) : nullptr); }

 private:
  PyObject* object_;
};

inline Ref import(const char* module) { return Ref(PyImport_ImportModule(module)); }

// The very same tensor as a Python object.
inline Ref from_tensor(const Tensor& tensor) {
  static PyObject* maker = nullptr;  // constant-initialised: no hidden lock that could wait for the GIL's holder
  if (maker == nullptr) {
    const Ref found = import("torch._C._aoti").attr("alloc_tensor_by_stealing_from_void_ptr");
    if (!found) return Ref(nullptr);
    maker = found.get();
    Py_INCREF(maker);
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  const Ref capsule(PyCapsule_New(handle, nullptr, nullptr));
  Ref object(capsule ? PyObject_CallFunctionObjArgs(maker, capsule.get(), nullptr) : nullptr);
  aoti_torch_delete_tensor_object(handle);  // what was stolen is the tensor inside it
  return object;
}

// The tensor in a Python object. Not defined(), with Python's error set, where the object is null or no tensor.
inline Tensor to_tensor(const Ref& object) {
  if (!object) return Tensor();
  const Ref maker = import("torch._C._aoti").attr("unsafe_alloc_void_ptr_from_tensor");
  const Ref capsule(maker ? PyObject_CallFunctionObjArgs(maker.get(), object.get(), nullptr) : nullptr);
  void* const handle = capsule ? PyCapsule_GetPointer(capsule.get(), nullptr) : nullptr;
  return handle != nullptr ? Tensor(static_cast<AtenTensorHandle>(handle)) : Tensor();
}

inline std::string to_string(const Ref& text) {
  const char* bytes = text ? PyUnicode_AsUTF8AndSize(text.get(), nullptr) : nullptr;
  return bytes != nullptr ? bytes : "?";
}

// Takes Python's error as "RuntimeError: its text", without torch's C++ stack.
inline std::string take_error() {
  PyObject *raw_type = nullptr, *raw_value = nullptr, *raw_trace = nullptr;
  PyErr_Fetch(&raw_type, &raw_value, &raw_trace);
  PyErr_NormalizeException(&raw_type, &raw_value, &raw_trace);
  const Ref type(raw_type), value(raw_value), trace(raw_trace);
  const std::string text = to_string(Ref(value ? PyObject_Str(value.get()) : nullptr));
  std::string error = to_string(type.attr("__name__")) + ": " + text.substr(0, text.find("\nException raised from"));
  PyErr_Clear();
  return error;
}

}  // namespace sgl_comm::python
