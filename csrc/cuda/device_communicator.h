// What the communicators of both protocols are made of: a group's memory, the limits that its ranks have agreed on, and
// the order of its calls.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_group.h"
#include "cuda/residency.h"
#include "cuda/stream_order.h"
#include "ledger.h"
#include "policy.h"

namespace sgl_comm::cuda {

// What a rank tells the others at init, as bytes over their own group.
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

  // Calls that this rank refused and its peers may have made: counted; and, before the next call, waited for until all
  // ranks have refused as many, after as many calls, or the group has failed.
  void count_refusal() { group_.count_refusal(ledger_.num_cuda_calls()); }
  void settle_refusals() {
    if (__builtin_expect(group_.refusals_pending(), 0)) group_.settle_refusals();
  }
  void count_call() { ledger_.count_cuda_call(); }
  bool cpu_failed() const { return ledger_.cpu_failed(); }

  // Set-up goes publish(), of the protocol; attach(), when the handles have gone round the group; settle().
  void settle() { group_.settle(); }

 protected:
  DeviceCommunicator(int rank, int world, int device, Thresholds thresholds, double timeout_seconds,
                     uint64_t first_epoch, Ledger ledger);

  // For a protocol whose kernels have these limits and which keeps so many bytes in the workspace.
  CommunicatorHandle publish(const Residency& limits, WorkspaceBytes bytes);
  std::string attach(const std::vector<CommunicatorHandle>& handles);  // empty, or why this rank cannot

  const DeviceGroup& group() const { return group_; }

 private:
  DeviceGroup group_;
  const Thresholds thresholds_;
  Ledger ledger_;
  Residency limits_;
  StreamOrder order_;
};

}  // namespace sgl_comm::cuda
