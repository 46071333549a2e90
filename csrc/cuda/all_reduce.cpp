// all_reduce between GPUs: by push kernels, else by pull kernels, else by the group's own backend.
#include "cuda/all_reduce.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cfg_calls.h"
#include "cuda/all_reduce_pull.h"
#include "cuda/all_reduce_push.h"
#include "cuda/capture_check.h"
#include "cuda/group/agreement.h"
#include "cuda/group/groups.h"
#include "cuda/launch.h"
#include "fallback.h"
#include "policy.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

// The communicator that sums a tensor; both null where the group's own backend does.
struct Summing {
  PushCommunicator* push = nullptr;
  PullCommunicator* pull = nullptr;
  explicit operator bool() const { return push != nullptr || pull != nullptr; }

  // Sums tensors of any strides in one launch. False, and nothing done, where a copy on either side is better.
  bool sum_strided(const char* op, const Tensor& in, Tensor& out) const {
    return push != nullptr && push_strided_all_reduce(op, *push, in, out);
  }

  void sum(const char* op, const Tensor& in, Tensor& out) const {
    if (push != nullptr) {
      push_all_reduce(op, *push, in, out, "auto");
    } else {
      pull_all_reduce(op, *pull, in, out);
    }
  }
};

Summing summing_for(const char* op, const Group& group, const Tensor& input, const std::string& reduce_op) {
  Summing summing;
  if (reduce_op == "sum" && dtype_of(input.scalar_type()) != DType::kOther) {
    const DeviceCommunicator* const serving = group.serving();
    if (serving != nullptr && num_bytes(input) <= serving->thresholds().fallback_bytes) {
      summing.push = group.push.serving();
      if (summing.push == nullptr) summing.pull = group.pull.serving();
    }
  }
  if (!summing) refuse_uncapturable(op, group, input);
  return summing;
}

Tensor reduced(const char* op, const Group& group, const Tensor& input, const std::string& reduce_op) {
  if (group.world == 1) return fresh_row_major(op, input);
  const Summing summing = summing_for(op, group, input, reduce_op);
  if (!summing) return fallback::all_reduce(op, input, group.name, reduce_op);
  Tensor out = empty_row_major(op, input);
  if (!summing.sum_strided(op, input, out)) summing.sum(op, row_major(input), out);
  return out;
}

void reduce_in_place(const char* op, const Group& group, Tensor& input, const std::string& reduce_op) {
  if (group.world == 1) return;
  const Summing summing = summing_for(op, group, input, reduce_op);
  if (summing.sum_strided(op, input, input)) return;
  in_place(input, [&](Tensor& x) {
    if (summing) {
      summing.sum(op, x, x);
    } else {
      torch::stable::copy_(x, fallback::all_reduce(op, x, group.name, reduce_op));
    }
  });
}

Tensor all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "all_reduce";
  check_all_reduce(kOp, input, reduce_op);
  return reduced(kOp, *groups().find(kOp, group_name), input, reduce_op);
}

void all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "all_reduce_";
  check_all_reduce(kOp, input, reduce_op);
  const auto group = groups().find(kOp, group_name);
  check_disjoint(kOp, input);
  reduce_in_place(kOp, *group, input, reduce_op);
}

struct CfgAllReduce : AgreedCall {
  Tensor input;
  std::string reduce_op;

  void check() const {
    check_all_reduce(op, input, reduce_op);
    check_device(input);
  }
  std::string describe() const { return describe_all_reduce(input, reduce_op); }
  Tensor run() const { return reduced(op, *group, input, reduce_op); }
};

struct CfgAllReduceInPlace : CfgAllReduce {
  void check() const {
    check_all_reduce(op, input, reduce_op);
    check_disjoint(op, input);
    check_device(input);
  }
  void run() { reduce_in_place(op, *group, input, reduce_op); }
};

Tensor cfg_all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce";
  return run_agreed(CfgAllReduce{{kOp, groups().find(kOp, group_name)}, input, reduce_op});
}

void cfg_all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce_";
  run_agreed(CfgAllReduceInPlace{{{kOp, groups().find(kOp, group_name)}, input, reduce_op}});
}

void check_dtype(const char* op, const Tensor& input) {
  SGL_CHECK(dtype_of(input.scalar_type()) != DType::kOther, op, ": got ", describe(input), "; expected ",
            kSummedDTypeNames, " (sgl_comm::all_reduce takes every dtype)");
}

template <typename Communicator>
Communicator& communicator_of(const char* op, const char* kernels, const Group& group, const Part<Communicator>& part) {
  const std::string reason = group.why_not(part);
  SGL_CHECK(part.serving() != nullptr, op, ": ", kernels, " do not serve group '", group.name, "'",
            reason.empty() ? "" : ": ", reason, "; sgl_comm::all_reduce does");
  return *part.serving();
}

Tensor custom_all_reduce_v2(const Tensor& input, const Text& group_name, const Text& algo) {
  constexpr const char* kOp = "custom_all_reduce_v2";
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  check_dtype(kOp, input);
  check_algorithm(kOp, algo);
  if (group->world == 1) return fresh_row_major(kOp, input);
  PushCommunicator& comm = communicator_of(kOp, "the push kernels", *group, group->push);
  Tensor out = empty_row_major(kOp, input);
  push_all_reduce(kOp, comm, row_major(input), out, algo);
  return out;
}

Tensor custom_all_reduce_v1(const Tensor& input, const Text& group_name) {
  constexpr const char* kOp = "custom_all_reduce_v1";
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  check_dtype(kOp, input);
  if (group->world == 1) return fresh_row_major(kOp, input);
  PullCommunicator& comm = communicator_of(kOp, "the pull kernels", *group, group->pull);
  Tensor out = empty_row_major(kOp, input);
  pull_all_reduce(kOp, comm, row_major(input), out);
  return out;
}

}  // namespace

Tensor sum_over_ranks(const char* op, const Group& group, const Tensor& input) {
  return reduced(op, group, input, "sum");
}

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::cuda::all_reduce));
  m.impl("all_reduce_", TORCH_BOX(&sgl_comm::cuda::all_reduce_));
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce));
  m.impl("cfg_all_reduce_", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce_));
  m.impl("custom_all_reduce_v1", TORCH_BOX(&sgl_comm::cuda::custom_all_reduce_v1));
  m.impl("custom_all_reduce_v2", TORCH_BOX(&sgl_comm::cuda::custom_all_reduce_v2));
}

// Sparse tensors are refused as others that the group cannot take, and the refusals are counted.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, SparseCUDA, m) {
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce));
  m.impl("cfg_all_reduce_", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce_));
}
