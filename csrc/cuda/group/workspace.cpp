#include "cuda/group/workspace.h"

#include <utility>

#include "cuda/cuda_check.h"
#include "cuda/device/view.h"

namespace sgl_comm::cuda {

namespace {
constexpr size_t kBlock = 2 << 20;  // IPC maps whole blocks of this size
}

Workspace::Workspace(WorkspaceBytes bytes, uint64_t first_epoch) {
  const int64_t zeros = device::kControlBytes + bytes.zeros;
  const size_t rounded = (zeros + bytes.ones + kBlock - 1) / kBlock * kBlock;
  void* memory = nullptr;
  SGL_CUDA_CHECK("init", cudaMalloc(&memory, rounded));
  data_ = static_cast<uint8_t*>(memory);
  device::Control control{};
  control.started = first_epoch * device::kEpoch;
  control.buffer_state = device::first_buffer_state(first_epoch).packed();
  SGL_CUDA_CHECK("init", cudaMemset(data_, 0, zeros));
  SGL_CUDA_CHECK("init", cudaMemcpy(data_, &control, sizeof control, cudaMemcpyHostToDevice));
  SGL_CUDA_CHECK("init", cudaMemset(data_ + zeros, 0xff, bytes.ones));
  SGL_CUDA_CHECK("init", cudaDeviceSynchronize());
}

Workspace::~Workspace() {
  if (data_ != nullptr) cudaFree(data_);
}

WorkspaceHandle Workspace::handle() const {
  WorkspaceHandle handle{};
  SGL_CUDA_CHECK("init", cudaIpcGetMemHandle(&handle.ipc, data_));
  handle.address = data_;
  return handle;
}

PeerWorkspace::PeerWorkspace(const WorkspaceHandle& handle, bool same_process) : mapped_(!same_process) {
  void* memory = handle.address;
  if (mapped_) SGL_CUDA_CHECK("init", cudaIpcOpenMemHandle(&memory, handle.ipc, cudaIpcMemLazyEnablePeerAccess));
  data_ = static_cast<uint8_t*>(memory);
}

PeerWorkspace::PeerWorkspace(PeerWorkspace&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), mapped_(std::exchange(other.mapped_, false)) {}

PeerWorkspace::~PeerWorkspace() {
  if (mapped_ && data_ != nullptr) cudaIpcCloseMemHandle(data_);
}

}  // namespace sgl_comm::cuda
