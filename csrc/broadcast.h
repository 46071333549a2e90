// What a broadcast refuses on every device.
#pragma once

#include "inference_only.h"
#include "tensor.h"

namespace sgl_comm {

inline void check_broadcast(const char* op, const Tensor& input, int64_t src, int world) {
  check_strided(op, input);
  check_inference_only(op, input);
  SGL_CHECK(src >= 0 && src < world, op, ": got src ", src, "; expected a rank of the group, 0 to ", world - 1);
}

}  // namespace sgl_comm
