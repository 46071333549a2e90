// What every op asks of every input: that it has strides, and does not require grad (the ops are inference-only).
#pragma once

#include "python_call.h"
#include "tensor.h"

namespace sgl_comm {

// The stable ABI has no getter for requires_grad (torch 2.11 to 2.15), so the question goes to the Python tensor, and
// only with grad mode on: under no_grad and inference_mode the check is one flag.
inline bool requires_grad(const Tensor& tensor) {
  const python::Gil gil;
  const python::Ref flag = python::from_tensor(tensor).attr("requires_grad");
  PyErr_Clear();
  return flag.get() == Py_True;
}

inline void check_inference_only(const char* op, const Tensor& tensor) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  SGL_CHECK(!requires_grad(tensor), op, ": got ", describe(tensor),
            " that requires grad; expected one that does not (the ops are inference-only: call them under"
            " torch.no_grad() or torch.inference_mode(), or detach() the input)");
}

inline void check_input(const char* op, const Tensor& input) {
  check_strided(op, input);
  check_inference_only(op, input);
}

}  // namespace sgl_comm
