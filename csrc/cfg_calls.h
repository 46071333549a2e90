// What the cfg_ ops refuse on every device, and their calls in words, alike on all ranks where they go together.
#pragma once

#include <string>

#include "inference_only.h"
#include "tensor.h"

namespace sgl_comm {

inline void check_broadcast(const char* op, const Tensor& input, int64_t src, int world) {
  check_strided(op, input);
  check_inference_only(op, input);
  SGL_CHECK(src >= 0 && src < world, op, ": got src ", src, "; expected a rank of the group, 0 to ", world - 1);
}

inline std::string describe_broadcast(const Tensor& input, int64_t src) {
  return "cfg_broadcast of " + describe(input) + " from rank " + std::to_string(src);
}

inline std::string describe_cfg_all_reduce(const Tensor& input, const std::string& reduce_op) {
  return "cfg_all_reduce of " + describe(input) + ", " + reduce_op;
}

}  // namespace sgl_comm
