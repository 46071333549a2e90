// CUDA's errors as ours, and the device a scope runs on.
#pragma once

#include <cuda_runtime.h>

#include "check.h"

#define SGL_CUDA_CHECK(op, call)                                                              \
  do {                                                                                        \
    const cudaError_t error_ = (call);                                                        \
    SGL_CHECK(error_ == cudaSuccess, op, ": " #call " failed: ", cudaGetErrorString(error_)); \
  } while (false)

namespace sgl_comm::cuda {

// Makes `device` the current one while in scope.
class DeviceScope {
 public:
  explicit DeviceScope(int device) {
    SGL_CUDA_CHECK("cuda", cudaGetDevice(&previous_));
    if (previous_ != device) {
      SGL_CUDA_CHECK("cuda", cudaSetDevice(device));
    } else {
      previous_ = -1;
    }
  }
  ~DeviceScope() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = -1;
};

}  // namespace sgl_comm::cuda
