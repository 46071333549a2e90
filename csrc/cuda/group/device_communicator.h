// What the push and the pull communicator have in common: a group's memory, the limits that its ranks have agreed on,
// and the order of its calls.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/group/device_group.h"
#include "cuda/group/stream_order.h"
#include "cuda/kernels/residency.h"
#include "ledger.h"
#include "policy.h"

namespace sgl_comm::cuda {

// What a communicator is made with.
struct CommunicatorOptions {
  int rank = 0;
  int world = 1;
  int device = 0;
  int64_t max_size = 0;  // bytes; what it bounds, the protocol says
  Thresholds thresholds{};
  double timeout_seconds = 0;  // of a wait
  uint64_t first_epoch = 0;
};

// What ranks exchange at init, as bytes over their own group.
struct CommunicatorHandle {
  DeviceHandle group;
  Residency residency;
  Thresholds thresholds;
  char failure[160];  // why this rank could not make its part; empty if it could
};

class DeviceCommunicator {
 public:
  int rank() const { return group_.rank(); }
  int world() const { return group_.world(); }
  int device() const { return group_.device(); }
  bool failed() const { return group_.failed(); }
  std::string fault() const { return group_.fault(); }

  const Thresholds& thresholds() const { return thresholds_; }
  const Residency& limits() const { return limits_; }
  StreamOrder& order() { return order_; }

  // Calls that this rank refused and its peers may have made. They are published to the peers; the next call waits
  // until all ranks have refused as many, after as many calls, or the group has failed.
  void publish_refusals() { group_.publish_refusals(ledger_.num_refusals(), num_calls()); }
  void settle_refusals() {
    const uint64_t refusals = ledger_.num_refusals();
    if (__builtin_expect(refusals != group_.settled_refusals(), 0)) group_.settle_refusals(refusals, num_calls());
  }
  void count_call() { num_calls_.fetch_add(1, std::memory_order_relaxed); }
  uint64_t num_calls() const { return num_calls_.load(std::memory_order_relaxed); }

  const Ledger& ledger() const { return ledger_; }

  // The steps of set-up: publish(), of the protocol; attach(), when the ranks have exchanged the handles; settle().
  void settle() { group_.settle(); }

 protected:
  DeviceCommunicator(const CommunicatorOptions& options, Ledger ledger);

  // For a protocol whose kernels have these limits and which keeps so many bytes in the workspace.
  CommunicatorHandle publish(const Residency& limits, WorkspaceBytes bytes);
  std::string attach(const std::vector<CommunicatorHandle>& handles);  // empty, or why this rank cannot

  const DeviceGroup& group() const { return group_; }

 private:
  DeviceGroup group_;
  const Thresholds thresholds_;
  const Ledger ledger_;
  std::atomic<uint64_t> num_calls_{0};  // eager ones and captured ones
  Residency limits_;
  StreamOrder order_;
};

}  // namespace sgl_comm::cuda
