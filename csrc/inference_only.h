// The ops are inference-only: an input that requires grad, with grad mode on, is refused.
#pragma once

#include <Python.h>

#include "tensor.h"

namespace sgl_comm {

// torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr, looked up once. The GIL, which the caller holds, guards it.
inline PyObject* python_tensor_maker() {
  static PyObject* maker = nullptr;  // constant-initialised: no hidden lock that could wait for the GIL's holder
  if (maker == nullptr) {
    PyObject* module = PyImport_ImportModule("torch._C._aoti");
    maker = module ? PyObject_GetAttrString(module, "alloc_tensor_by_stealing_from_void_ptr") : nullptr;
    Py_XDECREF(module);
  }
  return maker;
}

// The stable ABI has no getter for requires_grad (torch 2.11 to 2.15), so the question goes to the Python tensor, and
// only with grad mode on: under no_grad and inference_mode the check is one flag.
inline bool requires_grad(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  const PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* const maker = python_tensor_maker();
  PyObject* const capsule = maker ? PyCapsule_New(handle, nullptr, nullptr) : nullptr;
  PyObject* const python_tensor = capsule ? PyObject_CallFunctionObjArgs(maker, capsule, nullptr) : nullptr;
  PyObject* const flag = python_tensor ? PyObject_GetAttrString(python_tensor, "requires_grad") : nullptr;
  const bool answer = flag == Py_True;
  Py_XDECREF(flag);
  Py_XDECREF(python_tensor);
  Py_XDECREF(capsule);
  PyErr_Clear();
  PyGILState_Release(gil);
  aoti_torch_delete_tensor_object(handle);  // what was stolen is the tensor inside it
  return answer;
}

inline void check_inference_only(const char* op, const Tensor& tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  SGL_CHECK(!requires_grad(tensor), op, ": got ", describe(tensor),
            " that requires grad; expected one that does not (the ops are inference-only: call them under"
            " torch.no_grad() or torch.inference_mode(), or detach() the input)");
}

}  // namespace sgl_comm
