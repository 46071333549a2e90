// The grafter's ops: a tensor of one running system into those of another, on every device, by shared memory or by a
// backend of torch's (gloo, NCCL); and how far two tensors are apart.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>
#include <vector>

#include "cfg_calls.h"
#include "cpu/broadcast.h"
#include "cpu/difference.h"
#include "cpu/groups.h"
#include "cpu/parts.h"
#include "fallback.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// The stable ABI has no way to ask, so Python is asked.
bool in_graph_capture() {
  const python::Gil gil;
  const python::Ref ask = python::import("torch.cuda").attr("is_current_stream_capturing");
  const python::Ref answer(ask ? PyObject_CallFunctionObjArgs(ask.get(), nullptr) : nullptr);
  PyErr_Clear();
  return answer.get() == Py_True;
}

Tensor empty_on_host(const Tensor& like) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return torch::stable::empty(sizes, like.scalar_type());
}

// The receivers look at a segment while the next ones are under way.
constexpr int64_t kSegmentBytes = 8 << 20;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Waits of the group end that many seconds from now at the latest.
void limit_waits(const Text& group_name, double seconds) {
  const auto group = groups().find("grafter_broadcast_", group_name);
  group->waits_end_at = now() + seconds;
  if (group->communicator != nullptr) {
    group->communicator->limit_waits(seconds, "the grafter's timeout");
  } else {
    fallback::limit_waits("grafter_broadcast_", group->name, seconds);
  }
}

const std::byte* data_of(const Tensor& tensor) { return static_cast<const std::byte*>(tensor.const_data_ptr()); }
std::byte* data_of(Tensor& tensor) { return static_cast<std::byte*>(tensor.mutable_data_ptr()); }

// A smaller tensor passes through the slots sooner than by way of its source's room.
constexpr int64_t kLeastInRoom = 2 << 20;

// The source lays its tensor into its room and goes on once all have come; come(theirs) is called on the others. False
// where the source has no room to lay it in: then nothing has moved.
template <typename Come>
bool move_by_room(const char* op, ShmCommunicator& comm, int64_t src, Tensor& host, Come&& come) {
  const auto count = static_cast<uint64_t>(host.numel());
  const int source = static_cast<int>(src);
  const auto turn =
      comm.begin(op, {Call::Kind::kGrafterBroadcast, host.scalar_type(), count, static_cast<uint8_t>(src)});
  comm.next_step();
  SegmentHandle handle;
  bool has_room = false;
  std::string reason;
  if (comm.rank() == source) {
    const auto bytes = static_cast<size_t>(num_bytes(host));
    handle = comm.rooms().make(source, bytes);
    has_room = handle.descriptor >= 0;
    if (has_room) copy_bytes(data_of(std::as_const(host)), comm.rooms().data(source), bytes);
    std::memcpy(comm.slot(source), &handle, sizeof handle);
    comm.arrive();
  } else {
    comm.arrive();
    comm.await_arrival(source);
    std::memcpy(&handle, comm.slot(source), sizeof handle);
    has_room = handle.descriptor >= 0;
    if (has_room) reason = comm.rooms().find(source, handle);
    if (has_room && reason.empty()) come(comm.rooms().data(source));
  }
  comm.await_later();
  comm.next_step();
  comm.arrive();
  comm.await_later();
  SGL_CHECK(reason.empty(), op, ": the memory in which rank ", src, " has its tensor cannot be reached, ", reason);
  return has_room;
}

template <typename Come>
void move_host_by_shm(const char* op, ShmCommunicator& comm, int64_t src, Tensor& host, Come&& come) {
  if (num_bytes(host) >= kLeastInRoom && move_by_room(op, comm, src, host, come)) return;
  broadcast(op, comm, Call::Kind::kGrafterBroadcast, src, host);
  if (comm.rank() != src) come(data_of(std::as_const(host)));
}

// A tensor of another device goes by way of the host's memory.
template <typename Come>
void move_by_shm(const char* op, ShmCommunicator& comm, int64_t src, Tensor& buffer, Come&& come) {
  const int64_t bytes = num_bytes(buffer);
  if (buffer.is_cpu()) {
    move_host_by_shm(op, comm, src, buffer, [&](const std::byte* theirs) { come(theirs, 0, bytes); });
    return;
  }
  Tensor host = empty_on_host(buffer);
  if (comm.rank() == src) torch::stable::copy_(host, buffer);
  move_host_by_shm(op, comm, src, host, [&](const std::byte* theirs) {
    if (theirs != data_of(std::as_const(host))) copy_bytes(theirs, data_of(host), bytes);
    torch::stable::copy_(buffer, host);
  });
}

// `buffer` is row-major. On the receivers come(theirs, first, last) is told of all bytes, in order, when they have
// come: theirs is the memory in which the whole tensor will lie, `buffer`'s own (of whatever device) or, of a tensor
// that has come whole, another of the host's.
template <typename Come>
void send_or_receive(const char* op, const Groups::GroupPtr& group, int64_t src, Tensor& buffer, Come&& come) {
  if (group->communicator != nullptr) {
    move_by_shm(op, *group->communicator, src, buffer, come);
    return;
  }
  const int64_t segment_bytes = buffer.is_cpu() ? kSegmentBytes : num_bytes(buffer) + 1;
  const double end = group->waits_end_at;
  const auto limit = [&] {
    if (end > 0) fallback::limit_waits(op, group->name, std::max(1e-3, end - now()));
  };
  const auto arrived = [&](int64_t first, int64_t last) {
    if (group->rank != src) come(data_of(std::as_const(buffer)), first, last);
  };
  fallback::broadcast_in_place(op, buffer, src, group->name, segment_bytes, limit, arrived);
}

// Into `buffer` on the receivers, wherever it comes.
void move_into(const char* op, const Groups::GroupPtr& group, int64_t src, Tensor& buffer) {
  send_or_receive(op, group, src, buffer, [&](const std::byte* theirs, int64_t, int64_t last) {
    if (theirs != data_of(std::as_const(buffer))) copy_bytes(theirs, data_of(buffer), last);
  });
}

Groups::GroupPtr check_call(const char* op, const Tensor& input, int64_t src, const std::string& group_name) {
  auto group = groups().find(op, group_name);
  check_broadcast(op, input, src, group->world);
  SGL_CHECK(!input.is_cuda() || !in_graph_capture(), op, ": got ", describe(input),
            " inside a CUDA graph capture; expected an eager call (a replay could not meet the other system)");
  return group;
}

void grafter_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = check_call(kOp, input, src, group_name);
  const bool source = group->rank == src;
  if (!source) check_disjoint(kOp, input);
  if (group->world == 1) return;
  const auto move_all = [&](Tensor& buffer) { move_into(kOp, group, src, buffer); };
  if (source) {
    Tensor in = row_major(input);
    move_all(in);
  } else {
    overwrite(kOp, input, move_all);
  }
}

// Compares a row-major tensor with `ours` part by part. Parts do not depend on the number of threads.
class Comparison {
 public:
  Comparison(const char* op, const Tensor& theirs, const Tensor& ours)
      : dtype_(theirs.scalar_type()),
        count_(theirs.numel()),
        element_(theirs.element_size()),
        ours_(data_of(ours)),
        found_((count_ + kPart - 1) / kPart) {
    SGL_CHECK(can_compare(dtype_) && dtype_ == ours.scalar_type() && count_ == static_cast<size_t>(ours.numel()) &&
                  is_row_major(theirs) && is_row_major(ours) && theirs.is_cpu() && ours.is_cpu(),
              op, ": got ", describe(theirs), " and ", describe(ours),
              "; expected two row-major tensors alike, of float32, bfloat16, float16, float64 or int64");
  }

  // Of the bytes from first on; both ends lie between parts, or are the tensors'. Where `taken`
  // is not null it is ours, which become theirs.
  void add(const std::byte* theirs, int64_t first, int64_t last, std::byte* taken = nullptr) {
    const size_t part_bytes = kPart * element_, from = first / part_bytes, to = (last + part_bytes - 1) / part_bytes;
    for_each_part(to - from, kPartsAThread, [&](size_t index) {
      const size_t part = from + index, length = std::min(kPart, count_ - part * kPart);
      const size_t begin = part * part_bytes;
      found_[part] = difference(dtype_, theirs + begin, ours_ + begin, length);
      if (taken != nullptr) std::memcpy(taken + begin, theirs + begin, length * element_);
    });
  }

  // [finite, differing, NaN theirs, ours, infinite theirs, ours, theirs squared, ours squared, difference squared,
  // largest difference, largest in ULPs], as float64: see Difference.
  Tensor totals() const {
    Difference all;
    for (const Difference& part : found_) all = all + part;
    const double row[] = {static_cast<double>(all.finite),
                          static_cast<double>(all.differing),
                          static_cast<double>(all.theirs_nan),
                          static_cast<double>(all.ours_nan),
                          static_cast<double>(all.theirs_inf),
                          static_cast<double>(all.ours_inf),
                          all.theirs_squared,
                          all.ours_squared,
                          all.difference_squared,
                          all.max_abs,
                          all.max_ulp};
    constexpr int64_t kCount = sizeof row / sizeof *row;
    Tensor out = torch::stable::empty({kCount}, torch::headeronly::ScalarType::Double);
    std::copy_n(row, kCount, static_cast<double*>(out.mutable_data_ptr()));
    return out;
  }

 private:
  static constexpr size_t kPart = 64 << 10, kPartsAThread = 8;
  static_assert(kSegmentBytes % (kPart * sizeof(int64_t)) == 0);

  const torch::headeronly::ScalarType dtype_;
  const size_t count_, element_;
  const std::byte* const ours_;
  std::vector<Difference> found_;
};

Tensor grafter_compare(const Tensor& theirs, const Tensor& ours) {
  const Tensor a = row_major(theirs), b = row_major(ours);
  Comparison comparison("_grafter_compare", a, b);
  comparison.add(data_of(a), 0, num_bytes(a));
  return comparison.totals();
}

// grafter_broadcast_ on a receiver that compares `ours` with what comes. With `take`, ours becomes theirs when
// everything has come and nothing can fail: in the same pass where all comes at once, else out of `staging`.
Tensor grafter_receive_(Tensor staging, Tensor ours, bool take, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = check_call(kOp, staging, src, group_name);
  Comparison comparison(kOp, staging, ours);
  const int64_t bytes = num_bytes(staging);
  bool taken = false;
  send_or_receive(kOp, group, src, staging, [&](const std::byte* theirs, int64_t first, int64_t last) {
    const bool whole = first == 0 && last == bytes;
    taken = take && whole;
    comparison.add(theirs, first, last, taken ? data_of(ours) : nullptr);
  });
  if (take && !taken) copy_bytes(data_of(std::as_const(staging)), data_of(ours), bytes);
  return comparison.totals();
}

bool tensor_overlaps_itself(const Tensor& input) {
  check_strided("_overlaps_itself", input);
  return overlaps_itself(input);
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("_grafter_compare", TORCH_BOX(&sgl_comm::cpu::grafter_compare));
  m.impl("_grafter_receive_", TORCH_BOX(&sgl_comm::cpu::grafter_receive_));
}

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("grafter_broadcast_", TORCH_BOX(&sgl_comm::cpu::grafter_broadcast_));
  m.impl("_limit_waits", TORCH_BOX(&sgl_comm::cpu::limit_waits));
  m.impl("_overlaps_itself", TORCH_BOX(&sgl_comm::cpu::tensor_overlaps_itself));
}
