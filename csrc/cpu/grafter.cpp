// The grafter's ops: a tensor of one running system into those of another, on every device, by shared memory or by a
// backend of torch's (gloo, NCCL); and how far two tensors are apart.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
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

void grafter_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "grafter_broadcast_";
  const auto group = groups().find(kOp, group_name);
  check_broadcast(kOp, input, src, group->world);
  SGL_CHECK(!input.is_cuda() || !in_graph_capture(), kOp, ": got ", describe(input),
            " inside a CUDA graph capture; expected an eager call (a replay could not meet the other system)");
  const bool source = group->rank == src;
  if (!source) check_disjoint(kOp, input);
  if (group->world == 1) return;
  const auto move = [&](Tensor& buffer) {
    if (group->communicator != nullptr) {
      broadcast_by_shm(kOp, *group->communicator, src, buffer);
    } else {
      fallback::broadcast_in_place(kOp, buffer, src, group->name);
    }
  };
  if (source) {
    Tensor in = row_major(input);
    move(in);
  } else {
    overwrite(kOp, input, move);
  }
}

// [finite, differing, NaN theirs, ours, infinite theirs, ours, product, theirs squared, ours squared, difference
// squared, largest difference, largest in ULPs], as float64: see Difference. With `take`, ours becomes theirs, part by
// part, right after it was compared; nothing can fail in between. Parts do not depend on the number of threads.
Tensor grafter_compare_(const Tensor& theirs, Tensor ours, bool take) {
  constexpr const char* kOp = "_grafter_compare_";
  const auto dtype = theirs.scalar_type();
  SGL_CHECK(can_compare(dtype) && dtype == ours.scalar_type() && theirs.numel() == ours.numel() &&
                is_row_major(theirs) && is_row_major(ours),
            kOp, ": got ", describe(theirs), " and ", describe(ours),
            "; expected two row-major tensors alike, of float32, bfloat16, float16, float64 or int64");
  const auto count = static_cast<size_t>(theirs.numel()), element = static_cast<size_t>(theirs.element_size());
  const auto* from = static_cast<const std::byte*>(theirs.const_data_ptr());
  auto* to = static_cast<std::byte*>(ours.mutable_data_ptr());
  constexpr size_t kPart = 64 << 10, kTaken = 2 << 10;
  std::vector<Difference> found((count + kPart - 1) / kPart);
  torch::stable::parallel_for(0, static_cast<int64_t>(found.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const size_t stop = std::min(count, (part + 1) * kPart);
      for (size_t i = part * kPart; i < stop; i += kTaken) {
        const size_t length = std::min(kTaken, stop - i);
        found[part] = found[part] + difference(dtype, from + i * element, to + i * element, length);
        if (take) std::memcpy(to + i * element, from + i * element, length * element);
      }
    }
  });
  Difference all;
  for (const Difference& part : found) all = all + part;
  const double row[] = {static_cast<double>(all.finite),
                        static_cast<double>(all.differing),
                        static_cast<double>(all.theirs_nan),
                        static_cast<double>(all.ours_nan),
                        static_cast<double>(all.theirs_inf),
                        static_cast<double>(all.ours_inf),
                        all.product,
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

void shm_limit_waits(const Text& group_name, double timeout) {
  const auto group = groups().find("init", group_name);
  if (group->communicator != nullptr) group->communicator->limit_waits(timeout, "the grafter's timeout");
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("_grafter_compare_", TORCH_BOX(&sgl_comm::cpu::grafter_compare_));
}

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("grafter_broadcast_", TORCH_BOX(&sgl_comm::cpu::grafter_broadcast_));
  m.impl("_shm_limit_waits", TORCH_BOX(&sgl_comm::cpu::shm_limit_waits));
}
