// NCCL or gloo by group name, through torch's own functional collectives. Promises no summation order.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <string>

#include "tensor.h"

namespace sgl_comm::fallback {

inline void check_reduce_op(const char* op, const std::string& reduce_op) {
  for (const char* known : {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"}) {
    if (reduce_op == known) return;
  }
  fail("sgl_comm::", op, ": got reduce_op '", reduce_op,
       "'; expected one of sum, avg, product, min, max, band, bor, bxor");
}

// A fresh row-major tensor: `reduce_op` over every rank's input. Blocks the caller's stream, not the host, on CUDA.
inline Tensor all_reduce(const char* op, const Tensor& input, const std::string& group_name,
                         const std::string& reduce_op) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(row_major(input)), from(reduce_op), from(group_name)};
  for (const char* step : {"_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"}) {
    SGL_CHECK(torch_call_dispatcher(step, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, op,
              ": the fallback (", step, ", reduce_op '", reduce_op, "', group '", group_name, "') failed on ",
              describe(input), "; torch printed the cause on stderr");
  }
  return to<Tensor>(stack[0]);
}

}  // namespace sgl_comm::fallback
