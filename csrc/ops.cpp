// Defines every op (ops.h), and nothing else: who implements an op registers it at the end of its own file.
#include "ops.h"

#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sgl_comm, m) {
  for (const char* schema : sgl_comm::kSchemas) m.def(schema);
}

// Importing the library is what registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
