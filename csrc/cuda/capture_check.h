// What falls back inside a CUDA graph capture must be able to be captured; gloo cannot.
#pragma once

#include <string>

#include "cuda/group/groups.h"
#include "cuda/launch.h"

namespace sgl_comm::cuda {

// An error where the group's own backend would serve a stream that is being captured, and cannot. Call it before
// anything is sent.
inline void refuse_uncapturable(const char* op, const Group& group, const Tensor& input) {
  if (group.backend.find("nccl") != std::string::npos) return;
  const int device = input.get_device_index();
  const DeviceScope scope(device);
  const std::string reason = group.why_not(group.push);
  SGL_CHECK(capture_of(op, current_stream(device)).id == 0, op, ": got ", describe(input),
            " inside a CUDA graph capture, and only ", group.backend, " serves it in group '", group.name, "'",
            " (" + (reason.empty() ? std::string("the kernels sum ") + kSummedDTypeNames : reason) + ")",
            "; expected a call outside the capture, or a group with NCCL");
}

}  // namespace sgl_comm::cuda
