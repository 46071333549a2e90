// all_reduce between the processes of one host, through shared memory.
#include "cpu/all_reduce.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cfg_calls.h"
#include "cpu/agreement.h"
#include "cpu/sum.h"
#include "fallback.h"
#include "inference_only.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// Up to here every rank reads all inputs and sums all of it; above, each sums its part and reads the other parts.
constexpr size_t kDirectBytes = 8 << 10;
static_assert(kDirectBytes <= ShmCommunicator::kSlotBytes);

struct Message {
  DType dtype;
  const std::byte* in;
  std::byte* out;  // may be `in`
  size_t count;
};

// Sums elements [first, first + count) of the step's slots into `out`, which is where element `first` goes. This rank's
// own come from the caller's memory.
void sum_slots(const ShmCommunicator& comm, const Message& message, size_t first, size_t count, std::byte* out) {
  const void* sources[kMaxWorld];
  const size_t offset = first * size_of(message.dtype);
  for (int r = 0; r < comm.world(); ++r) sources[r] = (r == comm.rank() ? message.in : comm.slot(r)) + offset;
  sum_in_order(message.dtype, out, sources, comm.world(), count);
}

void direct(ShmCommunicator& comm, const Message& message) {
  comm.next_step();
  std::memcpy(comm.slot(comm.rank()), message.in, message.count * size_of(message.dtype));
  comm.arrive();
  comm.await_arrivals();
  sum_slots(comm, message, 0, message.count, message.out);
}

// One chunk, at most a slot large. Rank r sums the elements from part(r) to part(r + 1) and all copy out the sums.
void two_phase(ShmCommunicator& comm, const Message& message) {
  constexpr size_t kLine = 64;  // parts begin on cache lines of the slots
  const size_t size = size_of(message.dtype), bytes = message.count * size, world = comm.world();
  const size_t step = (bytes + world * kLine - 1) / (world * kLine) * kLine;
  const auto part = [&](int rank) { return std::min(bytes, rank * step); };
  const size_t begin = part(comm.rank()), end = part(comm.rank() + 1);

  comm.next_step();
  std::byte* const slot = comm.slot(comm.rank());
  std::memcpy(slot, message.in, begin);  // the peers' parts; one's own stays where it is
  std::memcpy(slot + end, message.in + end, bytes - end);
  comm.arrive();
  comm.await_arrivals();
  sum_slots(comm, message, begin / size, (end - begin) / size, comm.sums() + begin);
  comm.announce_sum();  // before the copy of one's own part, so that the peers can begin theirs
  std::memcpy(message.out + begin, comm.sums() + begin, end - begin);
  for (int peer = 0; peer < comm.world(); ++peer) {
    if (peer == comm.rank()) continue;
    comm.await_sum(peer);
    std::memcpy(message.out + part(peer), comm.sums() + part(peer), part(peer + 1) - part(peer));
  }
}

void sum_message(ShmCommunicator& comm, const Message& message) {
  const size_t size = size_of(message.dtype);
  if (comm.world() == 1) {
    if (message.out != message.in) std::memcpy(message.out, message.in, message.count * size);
    return;
  }
  if (message.count * size <= kDirectBytes) return direct(comm, message);
  const size_t chunk = ShmCommunicator::kSlotBytes / size;
  for (size_t first = 0; first < message.count; first += chunk) {
    two_phase(comm, {message.dtype, message.in + first * size, message.out + first * size,
                     std::min(chunk, message.count - first)});
  }
}

bool shm_serves(const Groups::GroupPtr& group, const Tensor& input, const std::string& reduce_op) {
  return group->communicator != nullptr && reduce_op == "sum" && dtype_of(input.scalar_type()) != DType::kOther;
}

void run(const char* op, Call::Kind kind, ShmCommunicator& comm, const Tensor& in, Tensor& out) {
  const auto dtype = in.scalar_type();
  const auto count = static_cast<size_t>(in.numel());
  const auto turn = comm.begin(op, {kind, dtype, count});
  sum_message(comm, {dtype_of(dtype), static_cast<const std::byte*>(in.const_data_ptr()),
                     static_cast<std::byte*>(out.mutable_data_ptr()), count});
}

Tensor reduced(const char* op, Call::Kind kind, const Groups::GroupPtr& group, const Tensor& input,
               const std::string& reduce_op) {
  if (!shm_serves(group, input, reduce_op)) return fallback::all_reduce(op, input, group->name, reduce_op);
  Tensor out = empty_row_major(op, input);
  run(op, kind, *group->communicator, row_major(input), out);
  return out;
}

void check_tensor(const char* op, const Tensor& input, const std::string& reduce_op) {
  check_strided(op, input);
  check_inference_only(op, input);
  fallback::check_reduce_op(op, reduce_op);
}

Groups::GroupPtr check(const char* op, const Tensor& input, const std::string& group_name,
                       const std::string& reduce_op) {
  check_tensor(op, input, reduce_op);
  return groups().find(op, group_name);
}

Tensor all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  const auto group = check("all_reduce", input, group_name, reduce_op);
  return reduced("all_reduce", Call::Kind::kAllReduce, group, input, reduce_op);
}

void reduce_in_place(const char* op, Call::Kind kind, const Groups::GroupPtr& group, Tensor& input,
                     const std::string& reduce_op) {
  in_place(input, [&](Tensor& x) {
    if (shm_serves(group, x, reduce_op)) {
      run(op, kind, *group->communicator, x, x);
    } else {
      torch::stable::copy_(x, fallback::all_reduce(op, x, group->name, reduce_op));
    }
  });
}

void all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  const auto group = check("all_reduce_", input, group_name, reduce_op);
  check_disjoint("all_reduce_", input);
  reduce_in_place("all_reduce_", Call::Kind::kAllReduce, group, input, reduce_op);
}

Tensor cfg_all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce";
  const auto group = groups().find(kOp, group_name);
  return call_agreed(
      kOp, group, [&] { check_tensor(kOp, input, reduce_op); },
      [&] { return describe_cfg_all_reduce(input, reduce_op); },
      [&] { return reduced(kOp, Call::Kind::kCfgAllReduce, group, input, reduce_op); });
}

void cfg_all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce_";
  const auto group = groups().find(kOp, group_name);
  const auto checks = [&] {
    check_tensor(kOp, input, reduce_op);
    check_disjoint(kOp, input);
  };
  call_agreed(
      kOp, group, checks, [&] { return describe_cfg_all_reduce(input, reduce_op); },
      [&] { reduce_in_place(kOp, Call::Kind::kCfgAllReduce, group, input, reduce_op); });
}

}  // namespace

Tensor sum_over_ranks(const char* op, Call::Kind kind, const Groups::GroupPtr& group, const Tensor& input) {
  return reduced(op, kind, group, input, "sum");
}

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::cpu::all_reduce));
  m.impl("all_reduce_", TORCH_BOX(&sgl_comm::cpu::all_reduce_));
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cpu::cfg_all_reduce));
  m.impl("cfg_all_reduce_", TORCH_BOX(&sgl_comm::cpu::cfg_all_reduce_));
}
