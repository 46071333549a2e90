// The ops are inference-only: an input that requires grad, with grad mode on, is refused.
#pragma once

#include <Python.h>

#include "tensor.h"

namespace sgl_comm {

// The stable ABI has no getter for requires_grad (torch 2.11 to 2.15), so the question goes to the Python tensor, and
// only with grad mode on: under no_grad and inference_mode the check is one flag.
inline bool requires_grad(const Tensor& tensor) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(tensor.get(), &handle));
  const PyGILState_STATE gil = PyGILState_Ensure();
  static PyObject* const steal = [] {
    PyObject* module = PyImport_ImportModule("torch._C._aoti");
    PyObject* function = module ? PyObject_GetAttrString(module, "alloc_tensor_by_stealing_from_void_ptr") : nullptr;
    Py_XDECREF(module);
    return function;
  }();
  bool answer = false;
  PyObject* capsule = PyCapsule_New(handle, nullptr, nullptr);
  PyObject* python_tensor = steal && capsule ? PyObject_CallFunctionObjArgs(steal, capsule, nullptr) : nullptr;
  if (python_tensor == nullptr) aoti_torch_delete_tensor_object(handle);
  PyObject* flag = python_tensor ? PyObject_GetAttrString(python_tensor, "requires_grad") : nullptr;
  answer = flag == Py_True;
  Py_XDECREF(flag);
  Py_XDECREF(python_tensor);
  Py_XDECREF(capsule);
  PyErr_Clear();
  PyGILState_Release(gil);
  return answer;
}

inline void check_inference_only(const char* op, const Tensor& tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  SGL_CHECK(!requires_grad(tensor), op, ": got ", describe(tensor),
            " that requires grad; expected one that does not (the ops are inference-only: call them under"
            " torch.no_grad() or torch.inference_mode(), or detach() the input)");
}

}  // namespace sgl_comm
