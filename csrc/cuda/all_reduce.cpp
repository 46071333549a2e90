// all_reduce between GPUs: by push kernels, else by pull kernels, else by the group's own backend.
#include "cuda/all_reduce.h"

#include <torch/csrc/stable/library.h>

#include <string>

#include "cfg_calls.h"
#include "cuda/agreement.h"
#include "cuda/all_reduce_pull.h"
#include "cuda/all_reduce_push.h"
#include "cuda/groups.h"
#include "cuda/launch.h"
#include "cuda/uncapturable.h"
#include "fallback.h"
#include "policy.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

using GroupV2 = GroupsV2::GroupPtr;

void check_tensor(const char* op, const Tensor& input, const std::string& reduce_op) {
  check_input(op, input);
  fallback::check_reduce_op(op, reduce_op);
}

GroupV2 check(const char* op, const Tensor& input, const std::string& group_name, const std::string& reduce_op) {
  check_tensor(op, input, reduce_op);
  return groups_v2().find(op, group_name);
}

// What serves a tensor of a group: the one or the other, or neither.
struct Kernels {
  CommunicatorV2* push = nullptr;
  GroupsV1::GroupPtr pull;
  explicit operator bool() const { return push != nullptr || pull != nullptr; }

  // Tensors of any strides in one launch; false, and nothing done, where a copy on either side is better.
  bool sum_strided(const char* op, const Tensor& in, Tensor& out) const {
    return push != nullptr && push_strided_all_reduce(op, *push, in, out);
  }

  void sum(const char* op, const Tensor& in, Tensor& out) const {
    if (push != nullptr) {
      push_all_reduce(op, *push, in, out, "auto");
    } else {
      pull_all_reduce(op, *pull->communicator, in, out);
    }
  }
};

Kernels kernels_for(const char* op, const GroupV2& group, const Tensor& input, const std::string& reduce_op) {
  Kernels kernels;
  if (reduce_op == "sum" && dtype_of(input.scalar_type()) != DType::kOther) {
    const int64_t bytes = num_bytes(input);
    const auto serves = [&](const auto* comm) { return comm != nullptr && bytes <= comm->thresholds().fallback_bytes; };
    if (group->communicator != nullptr) {
      if (serves(group->communicator.get())) kernels.push = group->communicator.get();
    } else {
      kernels.pull = groups_v1().find_if_settled(group->name);
      if (kernels.pull != nullptr && !serves(kernels.pull->communicator.get())) kernels.pull = nullptr;
    }
  }
  if (!kernels) refuse_uncapturable(op, *group, input);
  return kernels;
}

Tensor reduced(const char* op, const GroupV2& group, const Tensor& input, const std::string& reduce_op) {
  if (group->world == 1) return fresh_row_major(op, input);
  const Kernels kernels = kernels_for(op, group, input, reduce_op);
  if (!kernels) return fallback::all_reduce(op, input, group->name, reduce_op);
  Tensor out = empty_row_major(op, input);
  if (!kernels.sum_strided(op, input, out)) kernels.sum(op, row_major(input), out);
  return out;
}

void reduce_in_place(const char* op, const GroupV2& group, Tensor& input, const std::string& reduce_op) {
  if (group->world == 1) return;
  const Kernels kernels = kernels_for(op, group, input, reduce_op);
  if (kernels.sum_strided(op, input, input)) return;
  in_place(input, [&](Tensor& x) {
    if (kernels) {
      kernels.sum(op, x, x);
    } else {
      torch::stable::copy_(x, fallback::all_reduce(op, x, group->name, reduce_op));
    }
  });
}

Tensor all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  return reduced("all_reduce", check("all_reduce", input, group_name, reduce_op), input, reduce_op);
}

void all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  const auto group = check("all_reduce_", input, group_name, reduce_op);
  check_disjoint("all_reduce_", input);
  reduce_in_place("all_reduce_", group, input, reduce_op);
}

Tensor cfg_all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce";
  const auto group = groups_v2().find(kOp, group_name);
  return call_agreed(
      kOp, group, input, [&] { check_tensor(kOp, input, reduce_op); },
      [&] { return describe_cfg_all_reduce(input, reduce_op); }, [&] { return reduced(kOp, group, input, reduce_op); });
}

void cfg_all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce_";
  const auto group = groups_v2().find(kOp, group_name);
  const auto checks = [&] {
    check_tensor(kOp, input, reduce_op);
    check_disjoint(kOp, input);
  };
  call_agreed(
      kOp, group, input, checks, [&] { return describe_cfg_all_reduce(input, reduce_op); },
      [&] { reduce_in_place(kOp, group, input, reduce_op); });
}

void check_dtype(const char* op, const Tensor& input) {
  SGL_CHECK(dtype_of(input.scalar_type()) != DType::kOther, op, ": got ", describe(input),
            "; expected float32, bfloat16 or float16 (sgl_comm::all_reduce takes every dtype)");
}

template <typename Group>
void check_served(const char* op, const Group& group) {
  SGL_CHECK(group->communicator != nullptr, op, ": ", decltype(group->communicator)::element_type::kWhat, " group '",
            group->name, "'", group->reason.empty() ? "" : ": ", group->reason, "; sgl_comm::all_reduce does");
}

Tensor custom_all_reduce_v2(const Tensor& input, const Text& group_name, const Text& algo) {
  constexpr const char* kOp = "custom_all_reduce_v2";
  check_input(kOp, input);
  const auto group = groups_v2().find(kOp, group_name);
  check_dtype(kOp, input);
  choose(kOp, algo, 0, 1, 0, {});  // refuses an unknown name, at any world size
  if (group->world == 1) return fresh_row_major(kOp, input);
  check_served(kOp, group);
  Tensor out = empty_row_major(kOp, input);
  push_all_reduce(kOp, *group->communicator, row_major(input), out, algo);
  return out;
}

Tensor custom_all_reduce_v1(const Tensor& input, const Text& group_name) {
  constexpr const char* kOp = "custom_all_reduce_v1";
  check_input(kOp, input);
  const auto group = groups_v1().find(kOp, group_name);
  check_dtype(kOp, input);
  if (group->world == 1) return fresh_row_major(kOp, input);
  check_served(kOp, group);
  Tensor out = empty_row_major(kOp, input);
  pull_all_reduce(kOp, *group->communicator, row_major(input), out);
  return out;
}

}  // namespace

Tensor sum_over_ranks(const char* op, const GroupsV2::GroupPtr& group, const Tensor& input) {
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

// To be refused like others that the group cannot take, and counted.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, SparseCUDA, m) {
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce));
  m.impl("cfg_all_reduce_", TORCH_BOX(&sgl_comm::cuda::cfg_all_reduce_));
}
