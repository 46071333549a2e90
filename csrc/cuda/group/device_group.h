// A group of ranks on GPUs of one host: this rank's workspace, the peers' workspaces, and the way a failure reaches the
// host. A communicator says what lies in a workspace behind its Control.
//
// Who writes what, when: device/view.h for the control words. The host writes HostAbort (when a peer's process
// dies, or ranks have not refused the same calls), the segment's `refusals`, and its `unmapped` (when this rank has
// closed its mappings); it reads Fault. A workspace is freed only when every peer has unmapped it or is dead.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "cuda/device/view.h"
#include "cuda/group/workspace.h"
#include "group_segment.h"

namespace sgl_comm::cuda {

// What ranks exchange of their parts, as bytes over their own group.
struct DeviceHandle {
  SegmentHandle segment;
  WorkspaceHandle workspace;
  cudaUUID_t device;
  int64_t workspace_bytes;
  uint64_t first_epoch;
};

class DeviceGroup {
 public:
  DeviceGroup(int rank, int world, int device, double timeout_seconds, uint64_t first_epoch);
  // Closes this rank's mappings; frees the workspace if no peer still has it open, else keeps it for a later try.
  ~DeviceGroup();

  // Set-up, in this order on every rank; between publish() and attach() the ranks exchange their handles. `bytes`
  // follow the Control.
  DeviceHandle publish(WorkspaceBytes bytes);
  std::string attach(const std::vector<DeviceHandle>& handles);  // empty, or why this rank cannot
  void settle();                                                 // all ranks have attached

  int rank() const { return rank_; }
  int world() const { return world_; }
  int device() const { return device_; }
  const device::GroupView& view() const { return view_; }
  // The most ranks of the group that share a device.
  int most_on_a_device() const { return most_on_a_device_; }
  bool same_process(int peer) const { return segment_pids_[peer] == segment_pids_[rank_]; }

  // Why the communicator is unusable; empty while it is not. failed() is two reads of host memory.
  bool failed() const {
    return static_cast<const volatile device::Fault*>(fault_)->written != 0 ||
           static_cast<const volatile device::HostAbort*>(host_abort_)->abort != 0;
  }
  std::string fault() const;

  // A call that this rank alone refused would leave it one call behind its peers, whose data a later call of its own
  // would take for its own. So each rank publishes, in host memory, how many calls it has refused and how many it had
  // made then; and a rank that has refused makes its next call when every peer has published the same, or fails the
  // group, at the latest at the timeout.
  void publish_refusals(uint64_t refusals, uint64_t calls);
  void settle_refusals(uint64_t refusals, uint64_t calls);
  uint64_t settled_refusals() const { return settled_refusals_.load(std::memory_order_acquire); }

 private:
  // The last refusals of a rank, the k-th at k % kKept. A peer that is further ahead has settled those before with this
  // rank, or makes no call before it has settled later ones.
  struct PeerState {
    static constexpr uint64_t kKept = 64;
    std::atomic<uint32_t> unmapped;
    std::atomic<uint64_t> refusals[kKept];
  };
  struct Refusal {
    static constexpr int kCallBits = 40;
    uint64_t number, calls;
    uint64_t packed() const { return number << kCallBits | (calls & ((uint64_t{1} << kCallBits) - 1)); }
  };
  enum class Answer { kRefused, kNotYet, kAnother };
  Answer answer_of(int peer, const Refusal& own) const;
  // A workspace that may still be open at a peer.
  struct Retired {
    std::unique_ptr<Workspace> workspace;
    std::shared_ptr<GroupSegment> segment;
    int world;
    bool handle_published;  // peers may have opened it
    bool may_be_freed() const;
  };

  void fail(const device::AbortCode& code);
  PeerState* peer_states() const { return reinterpret_cast<PeerState*>(segment_->data()); }
  void watch();
  static void free_retired(bool wait);

  const int rank_;
  const int world_;
  const int device_;
  const double timeout_seconds_;
  const uint64_t first_epoch_;
  std::shared_ptr<GroupSegment> segment_ = std::make_shared<GroupSegment>();
  std::vector<int32_t> segment_pids_;
  std::unique_ptr<Workspace> workspace_;
  std::vector<PeerWorkspace> peers_;
  device::Fault* fault_ = nullptr;  // one pinned allocation: the fault, then the host's abort word
  device::HostAbort* host_abort_ = nullptr;
  device::GroupView view_{};
  int most_on_a_device_ = 1;
  std::mutex refusals_mutex_;
  std::atomic<uint64_t> settled_refusals_{0};
  std::thread watcher_;
  std::mutex watcher_mutex_;
  std::condition_variable watcher_wake_;
  bool closing_ = false;
  bool peers_elsewhere_ = false;  // in other processes
  bool handle_published_ = false;

  static std::mutex retired_mutex_;
  static std::vector<Retired> retired_;
};

}  // namespace sgl_comm::cuda
