// all_reduce between the processes of one host, through shared memory; by the fallback for other devices.
#include "cpu/all_reduce.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cfg_calls.h"
#include "cpu/agreement.h"
#include "cpu/sum.h"
#include "fallback.h"
#include "input_checks.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// Up to here every rank reads all inputs and sums all of it; above, each sums its part and reads the other parts.
constexpr size_t kDirectBytes = 8 << 10;
static_assert(kDirectBytes <= ShmCommunicator::kSlotBytes);

// What is summed: `count` elements at `in`, into `out`.
struct Operands {
  DType dtype;
  const std::byte* in;
  std::byte* out;  // may be `in`
  size_t count;
};

// Sums elements [first, first + count) of the step's slots into `out`, which is where element `first` goes. This rank's
// own come from the caller's memory.
void sum_slots(const ShmCommunicator& comm, const Operands& operands, size_t first, size_t count, std::byte* out) {
  const void* sources[kMaxWorld];
  const size_t offset = first * size_of(operands.dtype);
  for (int r = 0; r < comm.world(); ++r) sources[r] = (r == comm.rank() ? operands.in : comm.slot(r)) + offset;
  sum_in_order(operands.dtype, out, sources, comm.world(), count);
}

void direct(ShmCommunicator& comm, const Operands& operands) {
  comm.next_step();
  std::memcpy(comm.slot(comm.rank()), operands.in, operands.count * size_of(operands.dtype));
  comm.arrive();
  comm.await_arrivals();
  sum_slots(comm, operands, 0, operands.count, operands.out);
}

// One chunk, at most a slot large. Rank r sums the elements from part(r) to part(r + 1) and all copy out the sums.
void two_phase(ShmCommunicator& comm, const Operands& operands) {
  constexpr size_t kLine = 64;  // parts begin on cache lines of the slots
  const size_t size = size_of(operands.dtype), bytes = operands.count * size, world = comm.world();
  const size_t step = (bytes + world * kLine - 1) / (world * kLine) * kLine;
  const auto part = [&](int rank) { return std::min(bytes, rank * step); };
  const size_t begin = part(comm.rank()), end = part(comm.rank() + 1);

  comm.next_step();
  std::byte* const slot = comm.slot(comm.rank());
  std::memcpy(slot, operands.in, begin);  // the peers' parts; one's own stays where it is
  std::memcpy(slot + end, operands.in + end, bytes - end);
  comm.arrive();
  comm.await_arrivals();
  sum_slots(comm, operands, begin / size, (end - begin) / size, comm.sums() + begin);
  comm.announce_sum();  // before the copy of one's own part, so that the peers can begin theirs
  std::memcpy(operands.out + begin, comm.sums() + begin, end - begin);
  for (int peer = 0; peer < comm.world(); ++peer) {
    if (peer == comm.rank()) continue;
    comm.await_sum(peer);
    std::memcpy(operands.out + part(peer), comm.sums() + part(peer), part(peer + 1) - part(peer));
  }
}

void sum_message(ShmCommunicator& comm, const Operands& operands) {
  const size_t size = size_of(operands.dtype);
  if (comm.world() == 1) {
    if (operands.out != operands.in) std::memcpy(operands.out, operands.in, operands.count * size);
    return;
  }
  if (operands.count * size <= kDirectBytes) return direct(comm, operands);
  const size_t chunk = ShmCommunicator::kSlotBytes / size;
  for (size_t first = 0; first < operands.count; first += chunk) {
    two_phase(comm, {operands.dtype, operands.in + first * size, operands.out + first * size,
                     std::min(chunk, operands.count - first)});
  }
}

// The communicator that sums this tensor, or null where the group's own backend does.
ShmCommunicator* shm_for(const Group& group, const Tensor& input, const std::string& reduce_op) {
  const bool summed = reduce_op == "sum" && dtype_of(input.scalar_type()) != DType::kOther;
  return summed && input.is_cpu() ? group.shm.serving() : nullptr;
}

void sum(const char* op, Op id, ShmCommunicator& comm, const Tensor& in, Tensor& out) {
  const auto dtype = in.scalar_type();
  const auto count = static_cast<size_t>(in.numel());
  const auto turn = comm.begin(op, {id, dtype, count});
  sum_message(comm, {dtype_of(dtype), static_cast<const std::byte*>(in.const_data_ptr()),
                     static_cast<std::byte*>(out.mutable_data_ptr()), count});
}

Tensor reduced(const char* op, Op id, const Group& group, const Tensor& input, const std::string& reduce_op) {
  ShmCommunicator* const comm = shm_for(group, input, reduce_op);
  if (comm == nullptr) return fallback::all_reduce(op, input, group.name, reduce_op);
  Tensor out = empty_row_major(op, input);
  sum(op, id, *comm, row_major(input), out);
  return out;
}

void reduce_in_place(const char* op, Op id, const Group& group, Tensor& input, const std::string& reduce_op) {
  in_place(input, [&](Tensor& x) {
    if (ShmCommunicator* const comm = shm_for(group, x, reduce_op)) {
      sum(op, id, *comm, x, x);
    } else {
      torch::stable::copy_(x, fallback::all_reduce(op, x, group.name, reduce_op));
    }
  });
}

Tensor all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "all_reduce";
  check_all_reduce(kOp, input, reduce_op);
  return reduced(kOp, Op::kAllReduce, *groups().find(kOp, group_name), input, reduce_op);
}

void all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "all_reduce_";
  check_all_reduce(kOp, input, reduce_op);
  const auto group = groups().find(kOp, group_name);
  check_disjoint(kOp, input);
  reduce_in_place(kOp, Op::kAllReduce, *group, input, reduce_op);
}

struct CfgAllReduce : AgreedCall {
  Tensor input;
  std::string reduce_op;

  void check() const { check_all_reduce(op, input, reduce_op); }
  std::string describe() const { return describe_all_reduce(input, reduce_op); }
  Tensor run() const { return reduced(op, Op::kCfgAllReduce, *group, input, reduce_op); }
};

struct CfgAllReduceInPlace : CfgAllReduce {
  void check() const {
    CfgAllReduce::check();
    check_disjoint(op, input);
  }
  void run() { reduce_in_place(op, Op::kCfgAllReduce, *group, input, reduce_op); }
};

Tensor cfg_all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce";
  return run_agreed(CfgAllReduce{{kOp, groups().find(kOp, group_name)}, input, reduce_op});
}

void cfg_all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce_";
  run_agreed(CfgAllReduceInPlace{{{kOp, groups().find(kOp, group_name)}, input, reduce_op}});
}

[[noreturn]] void refuse_without_cuda(const char* op, const Tensor& input) {
  fail("sgl_comm::", op, ": got ", describe(input),
       "; expected a CUDA tensor and the package built with CUDA (see sgl_comm.build_info()); sgl_comm::all_reduce"
       " serves every device");
}

Tensor custom_all_reduce_v1(const Tensor& input, const Text&) { refuse_without_cuda("custom_all_reduce_v1", input); }

Tensor custom_all_reduce_v2(const Tensor& input, const Text&, const Text&) {
  refuse_without_cuda("custom_all_reduce_v2", input);
}

}  // namespace

Tensor sum_over_ranks(const char* op, Op id, const Group& group, const Tensor& input) {
  return reduced(op, id, group, input, "sum");
}

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::cpu::all_reduce));
  m.impl("all_reduce_", TORCH_BOX(&sgl_comm::cpu::all_reduce_));
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cpu::cfg_all_reduce));
  m.impl("cfg_all_reduce_", TORCH_BOX(&sgl_comm::cpu::cfg_all_reduce_));
}

// Devices without a form of their own; their in-place calls are the functional one and a copy (sgl_comm/ops.py).
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::cpu::all_reduce));
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cpu::cfg_all_reduce));
  m.impl("custom_all_reduce_v1", TORCH_BOX(&sgl_comm::cpu::custom_all_reduce_v1));
  m.impl("custom_all_reduce_v2", TORCH_BOX(&sgl_comm::cpu::custom_all_reduce_v2));
}
