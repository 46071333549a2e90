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
#include "cpu/parallel_for.h"
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

// The receivers look at a piece while the next ones are under way.
constexpr int64_t kPieceBytes = 8 << 20;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Waits of the group end at the latest so many seconds from now.
void limit_waits(const Text& group_name, double seconds) {
  const auto group = groups().find("grafter_broadcast_", group_name);
  groups().change(group_name, [&](Group& changed) { changed.waits_end_at = now() + seconds; });
  if (group->shm.serving() != nullptr) {
    group->shm.serving()->limit_waits(seconds, "the grafter's timeout");
  } else {
    fallback::limit_waits("grafter_broadcast_", group->name, seconds);
  }
}

const std::byte* data_of(const Tensor& tensor) { return static_cast<const std::byte*>(tensor.const_data_ptr()); }
std::byte* data_of(Tensor& tensor) { return static_cast<std::byte*>(tensor.mutable_data_ptr()); }

// A smaller tensor passes through the slots sooner than through a segment of its own.
constexpr int64_t kLeastForSegment = 2 << 20;

// The source copies its tensor into a segment and goes on once all ranks have arrived; arrived(theirs) is called on the
// others, with the segment's memory. False where the source cannot make a segment: then nothing has moved.
template <typename Arrived>
bool move_by_segment(const char* op, ShmCommunicator& comm, int64_t src, Tensor& host, Arrived&& arrived) {
  const auto count = static_cast<uint64_t>(host.numel());
  const int source = static_cast<int>(src);
  const auto turn = comm.begin(op, {Op::kGrafterBroadcast, host.scalar_type(), count, static_cast<uint8_t>(src)});
  comm.next_step();
  SegmentHandle handle;
  bool has_segment = false;
  std::string reason;
  if (comm.rank() == source) {
    const auto bytes = static_cast<size_t>(num_bytes(host));
    handle = comm.tensor_segments().make(source, bytes);
    has_segment = handle.descriptor >= 0;
    if (has_segment) copy_bytes(data_of(std::as_const(host)), comm.tensor_segments().data(source), bytes);
    std::memcpy(comm.slot(source), &handle, sizeof handle);
    comm.arrive();
  } else {
    comm.arrive();
    comm.await_arrival(source);
    std::memcpy(&handle, comm.slot(source), sizeof handle);
    has_segment = handle.descriptor >= 0;
    if (has_segment) reason = comm.tensor_segments().attach(source, handle);
    if (has_segment && reason.empty()) arrived(comm.tensor_segments().data(source));
  }
  comm.await_later();
  comm.next_step();
  comm.arrive();
  comm.await_later();
  SGL_CHECK(reason.empty(), op, ": the memory in which rank ", src, " has its tensor cannot be reached, ", reason);
  return has_segment;
}

template <typename Arrived>
void move_host_by_shm(const char* op, ShmCommunicator& comm, int64_t src, Tensor& host, Arrived&& arrived) {
  if (num_bytes(host) >= kLeastForSegment && move_by_segment(op, comm, src, host, arrived)) return;
  broadcast(op, comm, Op::kGrafterBroadcast, src, host);
  if (comm.rank() != src) arrived(data_of(std::as_const(host)));
}

// A tensor of another device goes by way of the host's memory.
template <typename Arrived>
void move_by_shm(const char* op, ShmCommunicator& comm, int64_t src, Tensor& tensor, Arrived&& arrived) {
  const int64_t bytes = num_bytes(tensor);
  if (tensor.is_cpu()) {
    move_host_by_shm(op, comm, src, tensor, [&](const std::byte* theirs) { arrived(theirs, 0, bytes); });
    return;
  }
  Tensor host = empty_on_host(tensor);
  if (comm.rank() == src) torch::stable::copy_(host, tensor);
  move_host_by_shm(op, comm, src, host, [&](const std::byte* theirs) {
    if (theirs != data_of(std::as_const(host))) copy_bytes(theirs, data_of(host), bytes);
    torch::stable::copy_(tensor, host);
  });
}

// `tensor` is row-major. On the receivers arrived(theirs, first, last) is called for all bytes, in order, when they are
// there. `theirs` is the memory in which the tensor will lie: `tensor`'s own (of whatever device) or, where all bytes
// arrive at once, other memory of the host.
template <typename Arrived>
void send_or_receive(const char* op, const GroupPtr& group, int64_t src, Tensor& tensor, Arrived&& arrived) {
  if (group->shm.serving() != nullptr) {
    move_by_shm(op, *group->shm.serving(), src, tensor, arrived);
    return;
  }
  fallback::Pieces pieces;
  pieces.bytes = tensor.is_cpu() ? kPieceBytes : num_bytes(tensor) + 1;
  pieces.before_start = [&] {
    const double end = group->waits_end_at;
    if (end > 0) fallback::limit_waits(op, group->name, std::max(1e-3, end - now()));
  };
  pieces.arrived = [&](int64_t first, int64_t last) {
    if (group->rank != src) arrived(data_of(std::as_const(tensor)), first, last);
  };
  fallback::broadcast_in_pieces(op, tensor, src, group->name, pieces);
}

// Into `tensor` on the receivers, wherever its bytes arrive.
void move_into(const char* op, const GroupPtr& group, int64_t src, Tensor& tensor) {
  send_or_receive(op, group, src, tensor, [&](const std::byte* theirs, int64_t, int64_t last) {
    if (theirs != data_of(std::as_const(tensor))) copy_bytes(theirs, data_of(tensor), last);
  });
}

GroupPtr check_call(const char* op, const Tensor& input, int64_t src, const std::string& group_name) {
  auto group = groups().find(op, group_name);
  check_broadcast(op, input, src, group->world);
  SGL_CHECK(!input.is_cuda() || !in_graph_capture(), op, ": got ", describe(input),
            " inside a CUDA graph capture; expected an eager call (a replay could not reach the other system)");
  return group;
}

void grafter_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = check_call(kOp, input, src, group_name);
  const bool source = group->rank == src;
  if (!source) check_disjoint(kOp, input);
  if (group->world == 1) return;
  const auto move_all = [&](Tensor& tensor) { move_into(kOp, group, src, tensor); };
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

  // Compares the bytes from `first` to `last`, each a boundary of parts or an end of the tensors. Where `taken` is not
  // null it is our tensor, which becomes theirs.
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
  static_assert(kPieceBytes % (kPart * sizeof(int64_t)) == 0);

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

// grafter_broadcast_ on a receiver that compares `ours` with what arrives. With `take`, ours becomes theirs when all
// bytes are there and nothing can fail: in the same pass where all arrive at once, else out of `staging`.
Tensor grafter_receive_(Tensor staging, Tensor ours, bool take, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = check_call(kOp, staging, src, group_name);
  Comparison comparison(kOp, staging, ours);
  const int64_t bytes = num_bytes(staging);
  bool taken = false;
  send_or_receive(kOp, group, src, staging, [&](const std::byte* theirs, int64_t first, int64_t last) {
    taken = take && first == 0 && last == bytes;
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
