// Set-up and tear-down of groups, as ops that Python's CustomAllReduceV2 calls; and the library's Python module.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <string>

#include "cuda/all_reduce.h"
#include "cuda/cuda_check.h"
#include "cuda/groups.h"
#include "handles.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

void group_open(const Text& name, int64_t rank, int64_t world) {
  groups().open(name, static_cast<int>(rank), static_cast<int>(world));
}

void group_close(const Text& name) { groups().close(name); }

// A handle that says so where this rank cannot make its part: the group must learn it, not wait for it.
Tensor v2_publish(const Text& name, int64_t device, int64_t max_size, double timeout) {
  const auto group = groups().find_open("init", name);
  HandleV2 handle{};
  try {
    const DeviceScope scope(static_cast<int>(device));
    group->communicator = std::make_unique<CommunicatorV2>(name, group->rank, group->world, static_cast<int>(device),
                                                           max_size > 0 ? max_size : CommunicatorV2::kDefaultSlotBytes,
                                                           timeout, load_all_reduce_kernels(group->world));
    handle = group->communicator->publish();
  } catch (const std::exception& error) {
    group->communicator.reset();
    handle = {};
    std::strncpy(handle.failure, error.what(), sizeof handle.failure - 1);
  }
  return to_bytes(handle);
}

std::string v2_attach(const Text& name, const Tensor& bytes) {
  const auto group = groups().find_open("init", name);
  const auto handles = from_bytes<HandleV2>(bytes, group->world);
  if (group->communicator) return group->communicator->attach(handles);
  return handles[group->rank].failure;
}

void v2_settle(const Text& name, bool agreed) {
  const auto group = groups().find_open("init", name);
  if (agreed) {
    group->communicator->settle();
  } else {
    group->communicator.reset();
  }
  group->settled.store(true, std::memory_order_release);
}

std::string v2_fault(const Text& name) {
  const auto group = groups().find("check", name);
  return group->communicator ? group->communicator->fault() : "";
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_group_open", TORCH_BOX(&sgl_comm::cuda::group_open));
  m.impl("_cuda_group_close", TORCH_BOX(&sgl_comm::cuda::group_close));
  m.impl("_v2_publish", TORCH_BOX(&sgl_comm::cuda::v2_publish));
  m.impl("_v2_attach", TORCH_BOX(&sgl_comm::cuda::v2_attach));
  m.impl("_v2_settle", TORCH_BOX(&sgl_comm::cuda::v2_settle));
  m.impl("_v2_fault", TORCH_BOX(&sgl_comm::cuda::v2_fault));
}

// Importing the library is what registers its ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
