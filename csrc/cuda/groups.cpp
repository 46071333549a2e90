// Set-up and tear-down of groups, as ops that Python's CustomAllReduceV1 and V2 call; and the library's Python module.
#include "cuda/groups.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda/cuda_check.h"
#include "handles.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

// What init does with a communicator of either protocol, step by step.
template <typename Communicator>
struct Steps {
  using Groups = Registry<Communicator>;
  static Groups& groups() { return Groups::instance(); }

  static void close(const Text& name) { groups().close(name); }

  // A handle that says so where this rank cannot make its part: the group must learn it, not wait for it.
  static Tensor publish(const Text& name, int64_t device, int64_t max_size, int64_t one_shot_bytes, int64_t ring_bytes,
                        int64_t fallback_bytes, double timeout, int64_t first_epoch, const Tensor& ledger) {
    const auto group = groups().find_open("init", name);
    CommunicatorHandle handle{};
    try {
      const DeviceScope scope(static_cast<int>(device));
      const Thresholds thresholds{one_shot_bytes, ring_bytes, fallback_bytes};
      group->communicator =
          std::make_unique<Communicator>(group->rank, group->world, static_cast<int>(device), max_size, thresholds,
                                         timeout, static_cast<uint64_t>(first_epoch), Ledger(ledger));
      handle = group->communicator->publish();
    } catch (const std::exception& error) {
      group->communicator.reset();
      handle = {};
      std::strncpy(handle.failure, error.what(), sizeof handle.failure - 1);
    }
    return to_bytes(handle);
  }

  static std::string attach(const Text& name, const Tensor& bytes) {
    const auto group = groups().find_open("init", name);
    const auto handles = from_bytes<CommunicatorHandle>(bytes, group->world);
    return group->communicator ? group->communicator->attach(handles) : std::string(handles[group->rank].failure);
  }

  static void settle(const Text& name, bool agreed, const Text& reason) { groups().settle(name, agreed, reason); }

  static std::string fault(const Text& name) { return groups().fault(name); }
};
using V1 = Steps<CommunicatorV1>;
using V2 = Steps<CommunicatorV2>;

void v1_open(const Text& name, int64_t rank, int64_t world) {
  groups_v1().open(name, static_cast<int>(rank), static_cast<int>(world));
}

void v2_open(const Text& name, int64_t rank, int64_t world, const Text& backend, bool compare_calls) {
  groups_v2().open(name, static_cast<int>(rank), static_cast<int>(world), backend, compare_calls);
}

// By which algorithm a message of so many bytes goes.
std::string v2_algorithm(const Text& name, int64_t bytes) {
  const auto group = groups_v2().find("explain", name);
  SGL_CHECK(group->communicator != nullptr, "explain: the push kernels do not serve group '", name, "'");
  const CommunicatorV2& comm = *group->communicator;
  return name_of(choose("explain", "auto", bytes, comm.world(), comm.bank_bytes(), comm.thresholds()));
}

// For calls of a capture(): the communicator, which must be there.
GraphInputs& graph_inputs(const std::string& name) {
  const auto group = groups_v1().find("capture", name);
  SGL_CHECK(group->communicator != nullptr, "capture: the pull kernels do not serve group '", name, "'");
  return group->communicator->graph_inputs();
}

void v1_begin_capture(const Text& name) { graph_inputs(name).begin(); }

Tensor v1_end_capture(const Text& name) {
  const std::vector<InputHandle> handles = graph_inputs(name).end();
  const auto bytes = static_cast<int64_t>(handles.size() * sizeof(InputHandle));
  Tensor out = torch::stable::empty({bytes}, torch::headeronly::ScalarType::Byte);
  if (bytes > 0) std::memcpy(out.mutable_data_ptr(), handles.data(), bytes);
  return out;
}

std::string v1_register(const Text& name, const Tensor& bytes) {
  std::vector<InputHandle> handles(bytes.numel() / sizeof(InputHandle));
  if (!handles.empty()) {
    std::memcpy(handles.data(), row_major(bytes).const_data_ptr(), handles.size() * sizeof(InputHandle));
  }
  return graph_inputs(name).fill_in(handles);
}

std::vector<int64_t> v1_counts(const Text& name) { return graph_inputs(name).counts(); }

// What the driver says of two devices of this process: 0 no access, 1 peer access, 2 with native atomics (NVLink).
int64_t link_of(int64_t device, int64_t peer) {
  int can = 0, native = 0;
  SGL_CUDA_CHECK("init", cudaDeviceCanAccessPeer(&can, static_cast<int>(device), static_cast<int>(peer)));
  if (can == 0) return 0;
  SGL_CUDA_CHECK("init", cudaDeviceGetP2PAttribute(&native, cudaDevP2PAttrNativeAtomicSupported,
                                                   static_cast<int>(device), static_cast<int>(peer)));
  return native != 0 ? 2 : 1;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_link", TORCH_BOX(&sgl_comm::cuda::link_of));
  m.impl("_v2_open", TORCH_BOX(&sgl_comm::cuda::v2_open));
  m.impl("_v2_close", TORCH_BOX(&sgl_comm::cuda::V2::close));
  m.impl("_v2_publish", TORCH_BOX(&sgl_comm::cuda::V2::publish));
  m.impl("_v2_attach", TORCH_BOX(&sgl_comm::cuda::V2::attach));
  m.impl("_v2_settle", TORCH_BOX(&sgl_comm::cuda::V2::settle));
  m.impl("_v2_fault", TORCH_BOX(&sgl_comm::cuda::V2::fault));
  m.impl("_v2_algorithm", TORCH_BOX(&sgl_comm::cuda::v2_algorithm));
  m.impl("_v1_open", TORCH_BOX(&sgl_comm::cuda::v1_open));
  m.impl("_v1_close", TORCH_BOX(&sgl_comm::cuda::V1::close));
  m.impl("_v1_publish", TORCH_BOX(&sgl_comm::cuda::V1::publish));
  m.impl("_v1_attach", TORCH_BOX(&sgl_comm::cuda::V1::attach));
  m.impl("_v1_settle", TORCH_BOX(&sgl_comm::cuda::V1::settle));
  m.impl("_v1_fault", TORCH_BOX(&sgl_comm::cuda::V1::fault));
  m.impl("_v1_begin_capture", TORCH_BOX(&sgl_comm::cuda::v1_begin_capture));
  m.impl("_v1_end_capture", TORCH_BOX(&sgl_comm::cuda::v1_end_capture));
  m.impl("_v1_register", TORCH_BOX(&sgl_comm::cuda::v1_register));
  m.impl("_v1_counts", TORCH_BOX(&sgl_comm::cuda::v1_counts));
}

// Importing the library is what registers its ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
