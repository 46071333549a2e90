// The grafter's ops: a tensor of one running system into those of another, on every device, by shared memory or by a
// backend of torch's (gloo, NCCL); and how far two tensors are apart.
#include <sched.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#include "cfg_calls.h"
#include "cpu/broadcast.h"
#include "cpu/difference.h"
#include "cpu/groups.h"
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

// Through shared memory a tensor of another device goes by way of the host's.
void broadcast_by_shm(const char* op, ShmCommunicator& comm, int64_t src, Tensor& buffer) {
  constexpr auto kKind = Call::Kind::kGrafterBroadcast;
  if (buffer.is_cpu()) {
    broadcast(op, comm, kKind, src, buffer);
    return;
  }
  Tensor host = empty_on_host(buffer);
  if (comm.rank() == src) torch::stable::copy_(host, buffer);
  broadcast(op, comm, kKind, src, host);
  if (comm.rank() != src) torch::stable::copy_(buffer, host);
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

// `buffer` is row-major. arrived(first, last) is told of all its bytes, in order, when they have come or gone.
template <typename Arrived>
void send_or_receive(const char* op, const Groups::GroupPtr& group, int64_t src, Tensor& buffer, Arrived&& arrived) {
  if (group->communicator != nullptr) {
    broadcast_by_shm(op, *group->communicator, src, buffer);
    arrived(0, num_bytes(buffer));
  } else {
    const int64_t segment_bytes = buffer.is_cpu() ? kSegmentBytes : num_bytes(buffer) + 1;
    const double end = group->waits_end_at;
    const auto limit = [&] {
      if (end > 0) fallback::limit_waits(op, group->name, std::max(1e-3, end - now()));
    };
    fallback::broadcast_in_place(op, buffer, src, group->name, segment_bytes, limit, arrived);
  }
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
  const auto move_all = [&](Tensor& buffer) { send_or_receive(kOp, group, src, buffer, [](int64_t, int64_t) {}); };
  if (source) {
    Tensor in = row_major(input);
    move_all(in);
  } else {
    overwrite(kOp, input, move_all);
  }
}

// Runs work(part) for each of so many parts. Large work gets threads of its own, whatever the model's: the model and
// the other system wait for it.
template <typename Work>
void for_each_part(size_t num_parts, size_t parts_a_thread, const Work& work) {
  constexpr size_t kMostThreads = 4;
  cpu_set_t cores{};
  sched_getaffinity(0, sizeof cores, &cores);
  const size_t allowed = std::clamp<size_t>(CPU_COUNT(&cores), 1, kMostThreads);
  const size_t num_threads = std::clamp<size_t>(num_parts / parts_a_thread, 1, allowed);
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t part = next++; part < num_parts; part = next++) work(part);
  };
  std::vector<std::thread> others;
  others.reserve(num_threads);
  try {
    while (others.size() + 1 < num_threads) others.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had: fewer do it
  }
  run();
  for (std::thread& other : others) other.join();
}

// Compares two row-major tensors part by part. Parts do not depend on the number of threads.
class Comparison {
 public:
  Comparison(const char* op, const Tensor& theirs, const Tensor& ours)
      : dtype_(theirs.scalar_type()),
        count_(theirs.numel()),
        element_(theirs.element_size()),
        theirs_(static_cast<const std::byte*>(theirs.const_data_ptr())),
        ours_(static_cast<const std::byte*>(ours.const_data_ptr())),
        found_((count_ + kPart - 1) / kPart) {
    SGL_CHECK(can_compare(dtype_) && dtype_ == ours.scalar_type() && count_ == static_cast<size_t>(ours.numel()) &&
                  is_row_major(theirs) && is_row_major(ours) && theirs.is_cpu() && ours.is_cpu(),
              op, ": got ", describe(theirs), " and ", describe(ours),
              "; expected two row-major tensors alike, of float32, bfloat16, float16, float64 or int64");
  }

  // Of the bytes from first on; both ends lie between parts, or are the tensors'.
  void add(int64_t first, int64_t last) {
    const size_t part_bytes = kPart * element_, from = first / part_bytes, to = (last + part_bytes - 1) / part_bytes;
    for_each_part(to - from, kPartsAThread, [&](size_t index) {
      const size_t begin = (from + index) * kPart, length = std::min(kPart, count_ - begin);
      found_[from + index] = difference(dtype_, theirs_ + begin * element_, ours_ + begin * element_, length);
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
  static constexpr size_t kPart = 64 << 10, kPartsAThread = 32;
  static_assert(kSegmentBytes % (kPart * sizeof(int64_t)) == 0);

  const torch::headeronly::ScalarType dtype_;
  const size_t count_, element_;
  const std::byte *const theirs_, *const ours_;
  std::vector<Difference> found_;
};

// Between row-major tensors of one size.
void copy_bytes(const Tensor& from, Tensor& to) {
  constexpr size_t kPart = 256 << 10, kPartsAThread = 32;
  const auto bytes = static_cast<size_t>(num_bytes(from));
  const auto* in = static_cast<const std::byte*>(from.const_data_ptr());
  auto* out = static_cast<std::byte*>(to.mutable_data_ptr());
  for_each_part((bytes + kPart - 1) / kPart, kPartsAThread, [&](size_t part) {
    std::memcpy(out + part * kPart, in + part * kPart, std::min(kPart, bytes - part * kPart));
  });
}

Tensor grafter_compare(const Tensor& theirs, const Tensor& ours) {
  const Tensor a = row_major(theirs), b = row_major(ours);
  Comparison comparison("_grafter_compare", a, b);
  comparison.add(0, num_bytes(a));
  return comparison.totals();
}

// grafter_broadcast_ on a receiver, into `staging`, which is compared with `ours` on the way. With `take`, ours becomes
// theirs at the end, when everything has come and nothing can fail.
Tensor grafter_receive_(Tensor staging, Tensor ours, bool take, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = check_call(kOp, staging, src, group_name);
  Comparison comparison(kOp, staging, ours);
  send_or_receive(kOp, group, src, staging, [&](int64_t first, int64_t last) { comparison.add(first, last); });
  if (take) copy_bytes(staging, ours);
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
