// cfg_broadcast between GPUs: the source pushes its tensor to every peer, bit for bit.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cfg_calls.h"
#include "cuda/capture_check.h"
#include "cuda/group/agreement.h"
#include "cuda/group/groups.h"
#include "cuda/kernels/push_kernels.h"
#include "cuda/launch.h"
#include "fallback.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

// Each warp takes a row. A block has as few threads as make one tile of the message, if any number does.
Shape shape_for(const Residency& limits, int64_t rows) {
  unsigned threads = 64;
  while (threads < device::kBroadcastThreads && rows * 32 > int64_t{device::kMostBroadcastBlocks} * threads)
    threads *= 2;
  return limits.shape(KernelKind::kBroadcast, rows * 32, threads, device::kMostBroadcastBlocks);
}

// The tensors of this rank: `in` on the source, `out` where the result goes; undefined where there is none.
struct Ends {
  Tensor in, out;

  const Tensor& either() const { return in.defined() ? in : out; }
  const void* from() const { return in.defined() ? in.const_data_ptr() : nullptr; }
  void* to() const { return out.defined() ? out.mutable_data_ptr() : nullptr; }
  bool row_major() const { return (!in.defined() || is_row_major(in)) && (!out.defined() || is_row_major(out)); }
};

class Pushing {
 public:
  Pushing(const char* op, PushCommunicator& comm, int64_t src) : op_(op), comm_(comm), src_(src) {}

  // Row-major ends.
  void push(const Ends& ends) const {
    const int64_t bytes = num_bytes(ends.either());
    if (bytes == 0) return;
    const Unit unit = unit_for(ends.from(), ends.to(), bytes);
    launch(broadcast_kernel(unit), parameters_for(ends, elements_of(unit, bytes)));
  }

  // Ends of any strides. False, and nothing done, where both are row-major, or row-major copies are better.
  bool push_strided(const Ends& ends) const {
    const Tensor& either = ends.either();
    if (ends.row_major() || num_bytes(either) == 0) return false;
    const int64_t unit_bytes = strided_unit_for(ends.from(), ends.to(), either.element_size());
    const auto strides = [&](const Tensor& end) { return end.defined() ? strides_of(end, unit_bytes) : Strides{}; };
    const auto from = strides(ends.in), to = strides(ends.out);
    if (!from || !to) return false;
    launch(strided_broadcast_kernel(unit_bytes), device::WithStrides<device::BroadcastParameters>{
                                                     parameters_for(ends, num_bytes(either) / unit_bytes), *from, *to});
    return true;
  }

 private:
  device::BroadcastParameters parameters_for(const Ends& ends, int64_t count) const {
    constexpr int64_t kRowBytes = device::kRowData * device::kPackBytes;
    device::BroadcastParameters parameters{};
    parameters.view = comm_.view();
    parameters.in = ends.from();
    parameters.out = ends.to();
    parameters.count = count;
    parameters.num_rows = (num_bytes(ends.either()) + kRowBytes - 1) / kRowBytes;
    parameters.source = static_cast<int>(src_);
    parameters.world = comm_.world();
    return parameters;
  }

  template <typename Parameters>
  void launch(void (*kernel)(Parameters), const Parameters& parameters) const {
    launch_in_order(op_, comm_, kernel, shape_for(comm_.limits(), parameters.num_rows), parameters);
  }

  const char* op_;
  PushCommunicator& comm_;
  const int64_t src_;
};

struct CfgBroadcast : AgreedCall {
  Tensor input;
  int64_t src;

  bool is_source() const { return group->rank == src; }
  void check() const {
    check_broadcast(op, input, src, group->world);
    check_device(input);
  }
  std::string describe() const { return describe_broadcast(input, src); }
  Tensor run() const {
    if (group->world == 1) return fresh_row_major(op, input);
    PushCommunicator* const comm = group->push.serving();
    if (comm == nullptr) {
      refuse_uncapturable(op, *group, input);
      return fallback::broadcast(op, input, src, group->name, group->rank);
    }
    check_usable(op, *comm, input);
    const Pushing pushing(op, *comm, src);
    Ends ends{is_source() ? input : Tensor(), empty_row_major(op, input)};
    if (!pushing.push_strided(ends)) {
      if (is_source()) ends.in = row_major(input);
      pushing.push(ends);
    }
    return ends.out;
  }
};

struct CfgBroadcastInPlace : CfgBroadcast {
  void check() const {
    check_broadcast(op, input, src, group->world);
    check_disjoint(op, input);
    check_device(input);
  }
  void run() {
    if (group->world == 1) return;
    PushCommunicator* const comm = group->push.serving();
    if (comm == nullptr) {
      refuse_uncapturable(op, *group, input);
      const Tensor sent = fallback::broadcast(op, input, src, group->name, group->rank);
      if (!is_source()) torch::stable::copy_(input, sent);
      return;
    }
    check_usable(op, *comm, input);
    const Pushing pushing(op, *comm, src);
    if (pushing.push_strided(is_source() ? Ends{input, Tensor()} : Ends{Tensor(), input})) return;
    if (is_source()) return pushing.push({row_major(input), Tensor()});
    overwrite(op, input, [&](Tensor& out) { pushing.push({Tensor(), out}); });
  }
};

Tensor cfg_broadcast(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  return run_agreed(CfgBroadcast{{kOp, groups().find(kOp, group_name)}, input, src});
}

void cfg_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast_";
  run_agreed(CfgBroadcastInPlace{{{kOp, groups().find(kOp, group_name)}, input, src}});
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast_));
}

// Sparse tensors are refused as others that the group cannot take, and the refusals are counted.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, SparseCUDA, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast_));
}
