// all_gather between the processes of one host, through shared memory; by the fallback for other devices.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/groups.h"
#include "fallback.h"
#include "input_checks.h"
#include "rows.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// Every rank's bytes pass through its slot, a chunk a step: copied once in and, by each peer, once out. The size alone
// decides how many steps there are, at least one: an empty call, too, must be the same on all ranks.
void gather(ShmCommunicator& comm, const std::byte* in, std::byte* out, size_t bytes) {
  if (comm.world() == 1) {
    std::memcpy(out, in, bytes);
    return;
  }
  size_t first = 0;
  do {
    const size_t length = std::min(ShmCommunicator::kSlotBytes, bytes - first);
    const auto shard = [&](int rank) { return out + rank * bytes + first; };
    comm.next_step();
    std::memcpy(comm.slot(comm.rank()), in + first, length);
    comm.arrive();
    std::memcpy(shard(comm.rank()), in + first, length);  // while the peers copy in theirs
    for (int next = 1; next < comm.world(); ++next) {
      const int peer = (comm.rank() + next) % comm.world();
      comm.await_arrival(peer);
      std::memcpy(shard(peer), comm.slot(peer), length);
    }
    first += length;
  } while (first < bytes);
}

Tensor all_gather(const Tensor& input, const Text& group_name) {
  constexpr const char* kOp = "all_gather";
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  ShmCommunicator* const comm = group->shm.serving();
  if (comm == nullptr || !input.is_cpu()) return fallback::all_gather(kOp, input, group_name, group->world);
  Tensor out = empty_row_major(kOp, input, gathered_sizes(kOp, input, group->world).data());
  const Tensor in = row_major(input);
  const auto count = static_cast<size_t>(in.numel());
  const auto turn = comm->begin(kOp, {Op::kAllGather, in.scalar_type(), count});
  gather(*comm, static_cast<const std::byte*>(in.const_data_ptr()), static_cast<std::byte*>(out.mutable_data_ptr()),
         count * in.element_size());
  return out;
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) { m.impl("all_gather", TORCH_BOX(&sgl_comm::cpu::all_gather)); }

// Devices without a form of their own.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("all_gather", TORCH_BOX(&sgl_comm::cpu::all_gather));
}
