// NCCL or gloo by group name, through torch's own functional collectives. Promises no summation order.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <string>

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

// A fresh row-major tensor: `reduce_op` over every rank's input. Blocks the caller's stream, not the host, on CUDA.
// Waits as long as the group's own timeout says.
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

}  // namespace sgl_comm::fallback
