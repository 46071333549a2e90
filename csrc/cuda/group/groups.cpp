// Set-up and tear-down of CUDA's part of a group, as ops that Python's CustomAllReduceV1 and V2 call.
#include "cuda/group/groups.h"

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/cuda_check.h"
#include "handles.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

// Calls visit(&Group::push) or visit(&Group::pull).
template <typename Visitor>
decltype(auto) visit_part(const Text& protocol, Visitor&& visit) {
  if (protocol == "push") return visit(&Group::push);
  SGL_CHECK(protocol == "pull", "init: got protocol '", protocol, "'; expected 'push' or 'pull'");
  return visit(&Group::pull);
}

template <typename Communicator>
Communicator communicator_of(Part<Communicator> Group::*);
template <typename Member>
using CommunicatorOf = decltype(communicator_of(Member{}));

void open(const Text& name, const Text& protocol, int64_t rank, int64_t world, const Text& backend,
          bool compare_calls) {
  groups().open({name, static_cast<int>(rank), static_cast<int>(world), compare_calls}, [&](Group& group) {
    const auto refuse_if = [&](bool taken) {
      SGL_CHECK(!taken, "init: group '", name, "' already has a communicator; close() it first");
    };
    group.backend = backend;
    if (protocol.empty()) {
      refuse_if(group.in_use());
      group.cpu_only = true;
      return;
    }
    visit_part(protocol, [&](auto part) {
      refuse_if(group.cpu_only || (group.*part).open);
      (group.*part).open = true;
    });
  });
}

void close(const Text& name, const Text& protocol) {
  groups().change(name, [&](Group& group) {
    if (protocol.empty()) {
      group.cpu_only = false;
    } else {
      visit_part(protocol, [&](auto part) { group.*part = {}; });
    }
  });
}

// Where this rank cannot make its communicator the handle says so: the other ranks must learn it, not wait for it.
Tensor publish(const Text& name, const Text& protocol, int64_t device, int64_t max_size, int64_t one_shot_bytes,
               int64_t ring_bytes, int64_t fallback_bytes, double timeout, int64_t first_epoch, const Tensor& ledger) {
  const auto group = groups().find_open("init", name);
  CommunicatorOptions options;
  options.rank = group->rank;
  options.world = group->world;
  options.device = static_cast<int>(device);
  options.max_size = max_size;
  options.thresholds.one_shot_bytes = one_shot_bytes;
  options.thresholds.ring_bytes = ring_bytes;
  options.thresholds.fallback_bytes = fallback_bytes;
  options.timeout_seconds = timeout;
  options.first_epoch = static_cast<uint64_t>(first_epoch);
  return visit_part(protocol, [&](auto part) {
    CommunicatorHandle handle{};
    try {
      const DeviceScope scope(options.device);
      const auto communicator = std::make_shared<CommunicatorOf<decltype(part)>>(options, Ledger(ledger));
      handle = communicator->publish();
      groups().change(name, [&](Group& changed) { (changed.*part).communicator = communicator; });
    } catch (const std::exception& error) {
      handle = {};
      std::strncpy(handle.failure, error.what(), sizeof handle.failure - 1);
    }
    return to_bytes(handle);
  });
}

std::string attach(const Text& name, const Text& protocol, const Tensor& bytes) {
  const auto group = groups().find_open("init", name);
  const auto handles = from_bytes<CommunicatorHandle>(bytes, group->world);
  return visit_part(protocol, [&](auto part) {
    const auto& communicator = (*group.*part).communicator;
    return communicator != nullptr ? communicator->attach(handles) : std::string(handles[group->rank].failure);
  });
}

void settle(const Text& name, const Text& protocol, bool agreed, const Text& reason) {
  const auto group = groups().find_open("init", name);
  visit_part(protocol, [&](auto part) {
    if (agreed) (*group.*part).communicator->settle();
    groups().change(name, [&](Group& changed) { (changed.*part).settle(agreed, reason); });
  });
}

std::string fault(const Text& name, const Text& protocol) {
  const auto group = groups().find("check", name);
  return visit_part(protocol, [&](auto part) {
    const auto* const communicator = (*group.*part).serving();
    return communicator != nullptr ? communicator->fault() : std::string();
  });
}

// By which algorithm a message of so many bytes goes.
std::string algorithm(const Text& name, int64_t bytes) {
  const auto group = groups().find("explain", name);
  const PushCommunicator* const comm = group->push.serving();
  SGL_CHECK(comm != nullptr, "explain: the push kernels do not serve group '", name, "'");
  return name_of(choose("explain", "auto", bytes, comm->world(), comm->buffer_bytes(), comm->thresholds()));
}

// For calls of a capture(): the communicator must be there.
GraphInputs& graph_inputs(const GroupPtr& group) {
  SGL_CHECK(group->pull.serving() != nullptr, "capture: the pull kernels do not serve group '", group->name, "'");
  return group->pull.serving()->graph_inputs();
}

void begin_capture(const Text& name) { graph_inputs(groups().find("capture", name)).begin(); }

Tensor end_capture(const Text& name) {
  const std::vector<InputHandle> handles = graph_inputs(groups().find("capture", name)).end();
  const auto bytes = static_cast<int64_t>(handles.size() * sizeof(InputHandle));
  Tensor out = torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte);
  if (bytes > 0) std::memcpy(out.mutable_data_ptr(), handles.data(), bytes);
  return out;
}

std::string register_inputs(const Text& name, const Tensor& bytes) {
  std::vector<InputHandle> handles(bytes.numel() / sizeof(InputHandle));
  if (!handles.empty()) {
    std::memcpy(handles.data(), row_major(bytes).const_data_ptr(), handles.size() * sizeof(InputHandle));
  }
  return graph_inputs(groups().find("capture", name)).fill_in(handles);
}

std::vector<int64_t> mapping_counts(const Text& name) { return graph_inputs(groups().find("capture", name)).counts(); }

// What the driver says of two devices of this process: 0 no access, 1 peer access, 2 with native atomics (NVLink).
int64_t peer_access(int64_t device, int64_t peer) {
  int can = 0, native = 0;
  SGL_CUDA_CHECK("init", cudaDeviceCanAccessPeer(&can, static_cast<int>(device), static_cast<int>(peer)));
  if (can == 0) return 0;
  SGL_CUDA_CHECK("init", cudaDeviceGetP2PAttribute(&native, cudaDevP2PAttrNativeAtomicSupported,
                                                   static_cast<int>(device), static_cast<int>(peer)));
  return native != 0 ? 2 : 1;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_open", TORCH_BOX(&sgl_comm::cuda::open));
  m.impl("_cuda_close", TORCH_BOX(&sgl_comm::cuda::close));
  m.impl("_cuda_publish", TORCH_BOX(&sgl_comm::cuda::publish));
  m.impl("_cuda_attach", TORCH_BOX(&sgl_comm::cuda::attach));
  m.impl("_cuda_settle", TORCH_BOX(&sgl_comm::cuda::settle));
  m.impl("_cuda_fault", TORCH_BOX(&sgl_comm::cuda::fault));
  m.impl("_cuda_algorithm", TORCH_BOX(&sgl_comm::cuda::algorithm));
  m.impl("_cuda_begin_capture", TORCH_BOX(&sgl_comm::cuda::begin_capture));
  m.impl("_cuda_end_capture", TORCH_BOX(&sgl_comm::cuda::end_capture));
  m.impl("_cuda_register_inputs", TORCH_BOX(&sgl_comm::cuda::register_inputs));
  m.impl("_cuda_mapping_counts", TORCH_BOX(&sgl_comm::cuda::mapping_counts));
  m.impl("_cuda_peer_access", TORCH_BOX(&sgl_comm::cuda::peer_access));
}
