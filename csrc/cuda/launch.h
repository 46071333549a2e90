// From an op's tensors to a launch: the checks that all CUDA ops share, the stream, and the order of launches.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>
#include <string>

#include "cuda/address.h"
#include "cuda/cuda_check.h"
#include "cuda/group/stream_order.h"
#include "cuda/kernels/residency.h"
#include "input_checks.h"
#include "tensor.h"

namespace sgl_comm::cuda {

template <typename Communicator>
void check_on_device(const char* op, const Communicator& comm, const Tensor& input) {
  SGL_CHECK(input.get_device_index() == comm.device(), op, ": got ", describe(input), ":", input.get_device_index(),
            "; expected device cuda:", comm.device(), ", which the group was initialised with");
}

// Throws where the communicator cannot serve the call. If this rank has refused calls, waits until its peers have too.
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

// dependent: the kernel may begin before the previous one of the stream has ended, and waits for that end itself.
template <typename Parameters>
void launch(const char* op, void (*kernel)(Parameters), Shape shape, cudaStream_t stream, bool dependent,
            const Parameters& parameters) {
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
  SGL_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, parameters));
}

// Launches on the current stream, in the order of the communicator's calls. early: the launch may be `dependent`.
template <typename Communicator, typename Parameters>
void launch_in_order(const char* op, Communicator& comm, void (*kernel)(Parameters), Shape shape,
                     const Parameters& parameters, bool early = true) {
  const DeviceScope scope(comm.device());
  const cudaStream_t stream = current_stream(comm.device());
  const auto turn = comm.order().next(op, stream);
  launch(op, kernel, shape, stream, early && turn.same_stream && comm.limits().dependent_launch, parameters);
  comm.count_call();
}

}  // namespace sgl_comm::cuda
