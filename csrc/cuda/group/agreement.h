// How ranks agree on a cfg_ call of CUDA tensors: calls are compared by the CPU's library, refusals counted by the
// communicator that would have served.
#pragma once

#include <string>

#include "cfg_calls.h"
#include "cuda/group/groups.h"
#include "cuda/launch.h"

namespace sgl_comm::cuda {

// Throws on every rank unless all ranks give the same text and none refuses.
void compare_calls(const char* op, const std::string& group_name, const std::string& text, bool refused);

// What run_agreed() of cfg_calls.h needs of any call; an op adds check(), describe() and run().
struct AgreedCall {
  const char* op;
  GroupPtr group;

  bool compares() const { return group->compare_calls && group->world > 1; }
  void compare(const std::string& text, bool refused) const { compare_calls(op, group->name, text, refused); }
  // Counted once for the group, and published to the peers by both of its communicators.
  void count_refusal() const;
  void count_call() const {
    if (const DeviceCommunicator* const comm = group->serving()) comm->ledger().count_cuda_call();
  }
  uint64_t num_begun() const {
    const DeviceCommunicator* const comm = group->serving();
    return comm != nullptr ? comm->num_calls() : 0;
  }
  void check_device(const Tensor& input) const {
    if (const DeviceCommunicator* const comm = group->serving()) check_on_device(op, *comm, input);
  }
};

}  // namespace sgl_comm::cuda
