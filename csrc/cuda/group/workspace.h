// One rank's memory that its peers write into or read from: one plain cudaMalloc, opened by each peer once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace sgl_comm::cuda {

// What ranks exchange of their workspaces.
struct WorkspaceHandle {
  cudaIpcMemHandle_t ipc;
  void* address;  // means something in the owner's process alone
};

// What a communicator keeps behind the Control: bytes that begin as zeros, then bytes that begin as ones (0xFF).
struct WorkspaceBytes {
  int64_t zeros = 0, ones = 0;
  int64_t all() const { return zeros + ones; }
};

// The rank's own workspace. Freed by the destructor; the owner sees to it that no peer has it open then.
class Workspace {
 public:
  // A Control at `first_epoch`, then so many bytes of zeros and so many of ones.
  Workspace(WorkspaceBytes bytes, uint64_t first_epoch);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  uint8_t* data() const { return data_; }
  WorkspaceHandle handle() const;

 private:
  uint8_t* data_ = nullptr;
};

// A peer's workspace, mapped here; a peer of this very process is its plain address.
class PeerWorkspace {
 public:
  PeerWorkspace(const WorkspaceHandle& handle, bool same_process);
  ~PeerWorkspace();
  PeerWorkspace(PeerWorkspace&& other) noexcept;
  PeerWorkspace& operator=(PeerWorkspace&&) = delete;

  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  bool mapped_ = false;
};

}  // namespace sgl_comm::cuda
