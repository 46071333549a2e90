// Storage for the push kernels: this rank's workspace, the peers' workspaces, and the way a failure reaches the host.
//
// Who writes what, when: device/push.cuh for the slots, device/view.cuh for the control words. The host writes
// HostAbort (the watcher thread, when a peer's process dies) and the segment's `unmapped` (when this rank has closed
// its mappings); it reads Fault. A workspace is freed only when every peer has unmapped it or is dead.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device/view.cuh"
#include "cuda/workspace.h"
#include "group_segment.h"

namespace sgl_comm::cuda {

// How many blocks of each kind of launch can be on this rank's device at once.
struct Residency {
  static constexpr int kKinds = 3;
  enum Kind { kOneShot128, kOneShot512, kRing512 };  // kernel and threads a block
  int blocks[kKinds] = {};
  bool dependent_launch = false;  // the kernels that this device runs were compiled to wait for the one before
};

// What a rank tells the others at init, as bytes over their own group.
struct HandleV2 {
  SegmentHandle segment;
  WorkspaceHandle workspace;
  cudaUUID_t device;
  Residency residency;
  int64_t slot_bytes;
  int32_t compute_capability;
  char failure[160];  // why this rank could not make its part; empty if it could
};

class CommunicatorV2 {
 public:
  static constexpr int64_t kDefaultSlotBytes = 4 << 20;
  static constexpr int64_t kMinSlotBytes = 64 << 10;

  CommunicatorV2(std::string group_name, int rank, int world, int device, int64_t slot_bytes, double timeout_seconds,
                 Residency residency);
  // Closes this rank's mappings; frees the workspace if no peer still has it open, else keeps it for a later try.
  ~CommunicatorV2();

  // Set-up, in this order on every rank; between the two the handles go round the group.
  HandleV2 publish();
  std::string attach(const std::vector<HandleV2>& handles);  // empty, or why this rank cannot
  void settle();                                             // all ranks have attached

  int world() const { return world_; }
  int device() const { return device_; }
  bool dependent_launch() const { return residency_.dependent_launch; }
  const device::GroupView& view() const { return view_; }
  // The most blocks a launch may have, the same on every rank: with them, two launches of every rank that shares a
  // device are on it at once.
  const Residency& limits() const { return limits_; }

  // Why the communicator is unusable; empty while it is not. failed() is two reads of host memory.
  bool failed() const {
    return static_cast<const volatile device::Fault*>(fault_)->written != 0 ||
           static_cast<const volatile device::HostAbort*>(host_abort_)->abort != 0;
  }
  std::string fault() const;

 private:
  struct PeerState {
    std::atomic<uint32_t> unmapped;
  };
  // A workspace that may still be open at a peer.
  struct Retired {
    std::unique_ptr<Workspace> workspace;
    std::shared_ptr<GroupSegment> segment;
    int world;
    bool told;  // its handle has gone to the peers
    bool may_be_freed() const;
  };

  PeerState* peer_states() const { return reinterpret_cast<PeerState*>(segment_->data()); }
  void watch();
  static void free_retired(bool wait);

  const std::string group_name_;
  const int rank_;
  const int world_;
  const int device_;
  const int64_t slot_bytes_;
  const double timeout_seconds_;
  const Residency residency_;
  Residency limits_;
  std::shared_ptr<GroupSegment> segment_ = std::make_shared<GroupSegment>();
  std::unique_ptr<Workspace> workspace_;
  std::vector<PeerWorkspace> peers_;
  device::Fault* fault_ = nullptr;  // one pinned allocation: the fault, then the host's abort word
  device::HostAbort* host_abort_ = nullptr;
  device::GroupView view_{};
  std::thread watcher_;
  std::mutex watcher_mutex_;
  std::condition_variable watcher_wake_;
  bool closing_ = false;
  bool peers_elsewhere_ = false;  // in other processes
  bool told_ = false;

  static std::mutex retired_mutex_;
  static std::vector<Retired> retired_;
};

}  // namespace sgl_comm::cuda
