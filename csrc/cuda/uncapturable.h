// What falls back inside a CUDA graph capture must be able to be captured; gloo cannot.
#pragma once

#include <string>

#include "cuda/launch.h"

namespace sgl_comm::cuda {

// Before anything is sent: an error where the group's own backend is to serve a stream that is being captured, and
// cannot.
template <typename Group>
void refuse_uncapturable(const char* op, const Group& group, const Tensor& input) {
  if (group.backend.find("nccl") != std::string::npos) return;
  const int device = input.get_device_index();
  const DeviceScope scope(device);
  SGL_CHECK(capture_of(op, current_stream(device)).id == 0, op, ": got ", describe(input),
            " inside a CUDA graph capture, and only ", group.backend, " serves it in group '", group.name, "'",
            group.reason.empty() ? " (the kernels sum float32, bfloat16 and float16)" : " (" + group.reason + ")",
            "; expected a call outside the capture, or a group with NCCL");
}

}  // namespace sgl_comm::cuda
