// From an op's tensors to a launch: the checks that all CUDA ops share, the stream, and what follows what.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <string>

#include "cuda/address.h"
#include "cuda/cuda_check.h"
#include "cuda/residency.h"
#include "cuda/stream_order.h"
#include "dispatch.h"
#include "inference_only.h"
#include "tensor.h"

namespace sgl_comm::cuda {

inline void check_input(const char* op, const Tensor& input) {
  check_strided(op, input);
  check_inference_only(op, input);
}

template <typename Communicator>
void check_on_device(const char* op, const Communicator& comm, const Tensor& input) {
  SGL_CHECK(input.get_device_index() == comm.device(), op, ": got ", describe(input), ":", input.get_device_index(),
            "; expected device cuda:", comm.device(), ", which the group was initialised with");
}

// Waits where this rank has refused calls, until its peers have too.
template <typename Communicator>
void check_usable(const char* op, Communicator& comm, const Tensor& input) {
  check_on_device(op, comm, input);
  comm.settle_refusals();
  SGL_CHECK(!comm.failed(), op, ": rank ", comm.rank(), ": ", comm.fault());
  SGL_CHECK(!comm.ledger().cpu_failed(), op, ": rank ", comm.rank(),
            ": a call of CPU tensors of this group has failed before,",
            " which a peer may have made with CUDA tensors. The communicator is unusable: close() it and init() again");
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// dependent: the kernel may begin before the one before it in the stream has ended, and waits for that end itself.
template <typename Message>
void launch(const char* op, void (*kernel)(Message), Shape shape, cudaStream_t stream, bool dependent,
            const Message& message) {
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.stream = stream;
  cudaLaunchAttribute attributes[2]{};
  config.attrs = attributes;
  if (dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {shape.cluster, 1, 1};
  }
  SGL_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, message));
}

// On the current stream, in the order of the communicator's calls. early: it may be `dependent`.
template <typename Communicator, typename Message>
void launch_in_order(const char* op, Communicator& comm, void (*kernel)(Message), Shape shape, const Message& message,
                     bool early = true) {
  const DeviceScope scope(comm.device());
  const cudaStream_t stream = current_stream(comm.device());
  const auto turn = comm.order().next(op, stream);
  launch(op, kernel, shape, stream, early && turn.same_stream && comm.limits().dependent_launch, message);
  comm.count_call();
}

}  // namespace sgl_comm::cuda
