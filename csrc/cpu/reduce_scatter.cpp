// reduce_scatter between the processes of one host, through shared memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cpu/groups.h"
#include "cpu/sum.h"
#include "fallback.h"
#include "inference_only.h"
#include "rows.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

struct Message {
  DType dtype;
  const std::byte* in;  // `world` shares
  std::byte* out;       // one
  size_t share_bytes;
};

// A rank's slot has a part for each peer: a piece of that peer's share, which the peer sums straight into its result.
// One's own share stays where it is. The size alone decides how many steps there are, at least one.
void sum_shares(ShmCommunicator& comm, const Message& message) {
  constexpr size_t kLine = 64;  // parts begin on cache lines of the slots
  const int world = comm.world(), rank = comm.rank();
  const size_t limit = ShmCommunicator::kSlotBytes / (world - 1) / kLine * kLine;
  size_t first = 0;
  do {
    const size_t length = std::min(limit, message.share_bytes - first);
    const size_t stride = (length + kLine - 1) / kLine * kLine;
    const auto share = [&](int owner) { return message.in + owner * message.share_bytes + first; };
    const auto part = [&](int from, int to) { return comm.slot(from) + (to - (to > from)) * stride; };
    comm.next_step();
    for (int peer = 0; peer < world; ++peer) {
      if (peer != rank) std::memcpy(part(rank, peer), share(peer), length);
    }
    comm.arrive();
    comm.await_arrivals();
    const void* sources[kMaxWorld];
    for (int from = 0; from < world; ++from) sources[from] = from == rank ? share(rank) : part(from, rank);
    sum_in_order(message.dtype, message.out + first, sources, world, length / size_of(message.dtype));
    first += length;
  } while (first < message.share_bytes);
}

Tensor reduce_scatter(const Tensor& input, const Text& group_name) {
  constexpr const char* kOp = "reduce_scatter";
  check_strided(kOp, input);
  check_inference_only(kOp, input);
  const auto group = groups().find(kOp, group_name);
  const DType dtype = dtype_of(input.scalar_type());
  if (group->communicator == nullptr || dtype == DType::kOther) {
    return fallback::reduce_scatter(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, scattered_sizes(kOp, input, group->world).data());
  const Tensor in = row_major(input);
  const Message message{dtype, static_cast<const std::byte*>(in.const_data_ptr()),
                        static_cast<std::byte*>(out.mutable_data_ptr()), out.numel() * size_of(dtype)};
  const auto count = static_cast<size_t>(in.numel());
  const auto turn = group->communicator->begin(kOp, {Call::Kind::kReduceScatter, in.scalar_type(), count});
  if (group->world == 1) {
    std::memcpy(message.out, message.in, message.share_bytes);
  } else {
    sum_shares(*group->communicator, message);
  }
  return out;
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) { m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::cpu::reduce_scatter)); }
