// NCCL or gloo by group name, through torch's own functional collectives. Promises no summation order. Each waits as
// long as the group's own timeout says; on CUDA it blocks the caller's stream, not the host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

#include "python_call.h"
#include "rows.h"
#include "tensor.h"

// The dispatcher cannot be used: torch 2.15 takes the names as `Any`, which the stable ABI does not convert. These two
// are what torch's own ahead-of-time compiler calls; libtorch_cpu has them from 2.11 to 2.15 at least, for every
// device. Weak, so that a torch without them costs the fallback and not the library.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__c10d_functional_all_reduce(AtenTensorHandle input,
                                                                                const char* reduce_op,
                                                                                const char* group_name,
                                                                                AtenTensorHandle* out);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__c10d_functional_wait_tensor(AtenTensorHandle input,
                                                                                 AtenTensorHandle* out);
}

namespace sgl_comm::fallback {

inline void check_reduce_op(const char* op, const std::string& reduce_op) {
  for (const char* known : {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"}) {
    if (reduce_op == known) return;
  }
  fail("sgl_comm::", op, ": got reduce_op '", reduce_op,
       "'; expected one of sum, avg, product, min, max, band, bor, bxor");
}

// A fresh row-major tensor: `reduce_op` over every rank's input.
inline Tensor all_reduce(const char* op, const Tensor& input, const std::string& group_name,
                         const std::string& reduce_op) {
  SGL_CHECK(aoti_torch_cpu__c10d_functional_all_reduce != nullptr, op,
            ": this torch has no entrance to NCCL or gloo"
            " that sgl_comm knows, and ",
            describe(input), " with reduce_op '", reduce_op, "' needs one");
  const auto check = [&](AOTITorchError code) {
    SGL_CHECK(code == AOTI_TORCH_SUCCESS, op, ": the fallback to the own backend of group '", group_name,
              "' (NCCL or gloo, reduce_op '", reduce_op, "') failed on ", describe(input),
              "; torch has logged the cause");
  };
  AtenTensorHandle pending = nullptr, done = nullptr;
  check(aoti_torch_cpu__c10d_functional_all_reduce(row_major(input).get(), reduce_op.c_str(), group_name.c_str(),
                                                   &pending));
  const Tensor owner(pending);
  check(aoti_torch_cpu__c10d_functional_wait_tensor(pending, &done));
  return Tensor(done);
}

// torch.ops._c10d_functional.NAME(*arguments, **keywords), and the wait for it: Python's own door, open in every torch.
inline Tensor call_functional(const char* op, const char* name, const Tensor& input, const std::string& group_name,
                              const python::Ref& arguments, const python::Ref& keywords) {
  // Where one of these is null Python's error is set, and nothing may be called until it is taken.
  const python::Ref functional =
      arguments && keywords ? python::import("torch").attr("ops").attr("_c10d_functional") : python::Ref(nullptr);
  const python::Ref start = functional.attr(name);
  const python::Ref pending(start ? PyObject_Call(start.get(), arguments.get(), keywords.get()) : nullptr);
  const python::Ref wait = pending ? functional.attr("wait_tensor") : python::Ref(nullptr);
  const python::Ref done(wait ? PyObject_CallFunctionObjArgs(wait.get(), pending.get(), nullptr) : nullptr);
  Tensor result = python::to_tensor(done);
  SGL_CHECK(result.defined(), op, ": the fallback to the own backend of group '", group_name,
            "' (NCCL or gloo) failed on ", describe(input), ": ", python::take_error());
  return result;
}

// Row-major memory as bytes, which every backend moves, whatever the dtype. Owns nothing.
inline Tensor bytes_of(const Tensor& tensor) {
  void* const data = const_cast<void*>(tensor.const_data_ptr());
  const int64_t size = num_bytes(tensor);
  return torch::stable::from_blob(data, {size}, {1}, tensor.device(), torch::headeronly::ScalarType::Byte);
}

// A fresh row-major tensor: the sums of this rank's share of the rows.
inline Tensor reduce_scatter(const char* op, const Tensor& input, const std::string& group_name, int world) {
  scattered_sizes(op, input, world);  // refuses what cannot be divided
  if (world == 1) return fresh_row_major(op, input);
  const Tensor in = row_major(input);
  const python::Gil gil;
  const python::Ref sent = python::from_tensor(in);
  const python::Ref arguments(Py_BuildValue("(O s i s)", sent.get(), "sum", world, group_name.c_str()));
  return call_functional(op, "reduce_scatter_tensor", input, group_name, arguments, python::Ref(PyDict_New()));
}

// A fresh row-major tensor: every rank's rows, bit for bit.
inline Tensor all_gather(const char* op, const Tensor& input, const std::string& group_name, int world) {
  Tensor out = empty_row_major(op, input, gathered_sizes(op, input, world).data());
  if (world == 1) return torch::stable::copy_(out, input);
  const Tensor in = row_major(input);  // lives until the bytes have gone
  const python::Gil gil;
  const python::Ref sent = python::from_tensor(bytes_of(in)), received = python::from_tensor(bytes_of(out));
  const python::Ref arguments(Py_BuildValue("(O i s)", sent.get(), world, group_name.c_str()));
  const python::Ref keywords(Py_BuildValue("{sO}", "out", received.get()));
  call_functional(op, "all_gather_into_tensor_out", input, group_name, arguments, keywords);
  return out;
}

// Rank src's bytes into the others' row-major memory.
inline void broadcast_in_place(const char* op, const Tensor& buffer, int64_t src, const std::string& group_name) {
  const python::Gil gil;
  const python::Ref moved = python::from_tensor(bytes_of(buffer));
  const python::Ref arguments(Py_BuildValue("(O L s)", moved.get(), static_cast<long long>(src), group_name.c_str()));
  call_functional(op, "broadcast_", buffer, group_name, arguments, python::Ref(PyDict_New()));
}

// A fresh row-major tensor: rank src's input, bit for bit.
inline Tensor broadcast(const char* op, const Tensor& input, int64_t src, const std::string& group_name, int rank) {
  const Tensor out = rank == src ? fresh_row_major(op, input) : empty_row_major(op, input);
  broadcast_in_place(op, out, src, group_name);
  return out;
}

}  // namespace sgl_comm::fallback
