// The CUDA library as a Python module, and what tests ask of the library itself.
#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <vector>

#include "cuda/address.h"
#include "cuda/kernels/pull_kernels.h"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::cuda {

namespace {

// The kernels that init loads for a group of so many ranks, as offsets in this library.
std::vector<int64_t> loaded_kernels(int64_t world) {
  std::vector<int64_t> offsets;
  for (const KernelTable& table :
       {push_kernel_table(static_cast<int>(world)), pull_kernel_table(static_cast<int>(world))}) {
    for (const KernelTable::Entry& entry : table.entries()) {
      Dl_info library{};
      SGL_CHECK(dladdr(entry.kernel, &library) != 0, "_cuda_loaded_kernels: a kernel lies in no library");
      offsets.push_back(static_cast<int64_t>(address_of(entry.kernel) - address_of(library.dli_fbase)));
    }
  }
  return offsets;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_cuda_loaded_kernels", TORCH_BOX(&sgl_comm::cuda::loaded_kernels));
}

// Importing the library is what registers its ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
