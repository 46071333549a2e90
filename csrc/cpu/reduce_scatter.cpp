// reduce_scatter between the processes of one host, through shared memory; by the fallback for other devices.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/groups.h"
#include "cpu/sum.h"
#include "fallback.h"
#include "input_checks.h"
#include "rows.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// What is summed: `in` has a share a rank, `out` this rank's.
struct Shares {
  DType dtype;
  const std::byte* in;
  std::byte* out;
  size_t share_bytes;
};

// A rank's slot has a part for each peer: a piece of that peer's share, which the peer sums straight into its result.
// One's own share stays where it is. The size alone decides how many steps there are, at least one.
void sum_shares(ShmCommunicator& comm, const Shares& shares) {
  constexpr size_t kLine = 64;  // parts begin on cache lines of the slots
  const int world = comm.world(), rank = comm.rank();
  const size_t limit = ShmCommunicator::kSlotBytes / (world - 1) / kLine * kLine;
  size_t first = 0;
  do {
    const size_t length = std::min(limit, shares.share_bytes - first);
    const size_t stride = (length + kLine - 1) / kLine * kLine;
    const auto share = [&](int owner) { return shares.in + owner * shares.share_bytes + first; };
    const auto part = [&](int from, int to) { return comm.slot(from) + (to - (to > from)) * stride; };
    comm.next_step();
    for (int peer = 0; peer < world; ++peer) {
      if (peer != rank) std::memcpy(part(rank, peer), share(peer), length);
    }
    comm.arrive();
    comm.await_arrivals();
    const void* sources[kMaxWorld];
    for (int from = 0; from < world; ++from) sources[from] = from == rank ? share(rank) : part(from, rank);
    sum_in_order(shares.dtype, shares.out + first, sources, world, length / size_of(shares.dtype));
    first += length;
  } while (first < shares.share_bytes);
}

Tensor reduce_scatter(const Tensor& input, const Text& group_name) {
  constexpr const char* kOp = "reduce_scatter";
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  ShmCommunicator* const comm = group->shm.serving();
  const DType dtype = dtype_of(input.scalar_type());
  if (comm == nullptr || !input.is_cpu() || dtype == DType::kOther) {
    return fallback::reduce_scatter(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, scattered_sizes(kOp, input, group->world).data());
  const Tensor in = row_major(input);
  Shares shares;
  shares.dtype = dtype;
  shares.in = static_cast<const std::byte*>(in.const_data_ptr());
  shares.out = static_cast<std::byte*>(out.mutable_data_ptr());
  shares.share_bytes = out.numel() * size_of(dtype);
  const auto count = static_cast<size_t>(in.numel());
  const auto turn = comm->begin(kOp, {Op::kReduceScatter, in.scalar_type(), count});
  if (group->world == 1) {
    std::memcpy(shares.out, shares.in, shares.share_bytes);
  } else {
    sum_shares(*comm, shares);
  }
  return out;
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) { m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::cpu::reduce_scatter)); }

// Devices without a form of their own.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::cpu::reduce_scatter));
}
