// Every op of the package: its schema and one line of meaning. Nothing else happens here; who implements an op
// registers it at the end of its own file.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sgl_comm, m) {
  // The front door: the sum (or `reduce_op`) of every rank's input, fresh and row-major. Always right: push kernels
  // or shared memory where they serve the group and dtype, else NCCL or gloo.
  m.def("all_reduce(Tensor input, str group_name, str reduce_op=\"sum\") -> Tensor");
  // The same, in place, for any strides.
  m.def("all_reduce_(Tensor(a!) input, str group_name, str reduce_op=\"sum\") -> ()");
  // Pull over peer pointers (CUDA); an error, never a fallback, where it cannot.
  m.def("custom_all_reduce_v1(Tensor input, str group_name) -> Tensor");
  // Push through an owned workspace (CUDA); an error, never a fallback, where it cannot. algo: auto, one_shot,
  // two_shot, one_shot_ring or two_shot_ring.
  m.def("custom_all_reduce_v2(Tensor input, str group_name, str algo=\"auto\") -> Tensor");
  // The sum of every rank's input, divided along dim 0 into a share a rank: rank r gets the r-th. Fresh and row-major.
  m.def("reduce_scatter(Tensor input, str group_name) -> Tensor");
  // Every rank's input along dim 0, in rank order, bit for bit, for every dtype. Fresh and row-major.
  m.def("all_gather(Tensor input, str group_name) -> Tensor");
  // all_reduce for tensors of any layout, which may differ between ranks, as diffusion models have under
  // classifier-free-guidance parallelism; fresh and row-major, and in place.
  m.def("cfg_all_reduce(Tensor input, str group_name, str reduce_op=\"sum\") -> Tensor");
  m.def("cfg_all_reduce_(Tensor(a!) input, str group_name, str reduce_op=\"sum\") -> ()");
  // Rank src's input, bit for bit, for every dtype and layout: fresh and row-major, and in place.
  m.def("cfg_broadcast(Tensor input, int src, str group_name) -> Tensor");
  m.def("cfg_broadcast_(Tensor(a!) input, int src, str group_name) -> ()");
  // The sum over ranks, plus the residual, then its RMSNorm or LayerNorm along the last dimension: (normed, new
  // residual), both fresh and row-major.
  m.def(
      "tp_attn_all_reduce_and_layernorm(Tensor hidden_states, Tensor residual, Tensor weight, Tensor? bias, float eps,"
      " str norm=\"rms\", float weight_offset=0.0, *, str group_name) -> (Tensor, Tensor)");

  // Between two running systems that the grafter has joined: rank src's input into the others', bit for bit, for every
  // dtype and layout, in place.
  m.def("grafter_broadcast_(Tensor(a!) input, int src, str group_name) -> ()");
  m.def("_grafter_receive_(Tensor(a!) staging, Tensor(b!) ours, bool take, int src, str group_name) -> Tensor");
  m.def("_grafter_compare(Tensor theirs, Tensor ours) -> Tensor");
  m.def("_overlaps_itself(Tensor input) -> bool");
  m.def("_limit_waits(str group_name, float seconds) -> ()");

  // Set-up and tear-down, called by Python's Communicator alone. A handle is a fixed-size uint8 tensor that the
  // ranks exchange over their own group; reasons and texts are empty when all is well.
  m.def("_group_open(str group_name, int rank, int world, bool compare_calls=False) -> ()");
  m.def("_group_close(str group_name) -> ()");
  m.def("_shm_publish(str group_name, float timeout, int first_epoch) -> Tensor");
  m.def("_shm_attach(str group_name, Tensor handles) -> str");
  m.def("_shm_settle(str group_name, bool agreed) -> ()");
  m.def("_shm_fault(str group_name) -> str");
  m.def("_ledger(str group_name) -> Tensor");
  m.def("_layout_copies() -> int");
  m.def("_compare_calls(str group_name, str op, str text, bool refused) -> str");
  m.def("_cuda_link(int device, int peer) -> int");
  m.def("_v2_open(str group_name, int rank, int world, str backend, bool compare_calls=False) -> ()");
  m.def("_v2_close(str group_name) -> ()");
  m.def(
      "_v2_publish(str group_name, int device, int max_size, int one_shot_bytes, int ring_bytes, int fallback_bytes,"
      " float timeout, int first_epoch, Tensor ledger) -> Tensor");
  m.def("_v2_attach(str group_name, Tensor handles) -> str");
  m.def("_v2_settle(str group_name, bool agreed, str reason) -> ()");
  m.def("_v2_fault(str group_name) -> str");
  m.def("_v2_algorithm(str group_name, int bytes) -> str");
  m.def("_v1_open(str group_name, int rank, int world) -> ()");
  m.def("_v1_close(str group_name) -> ()");
  m.def(
      "_v1_publish(str group_name, int device, int max_size, int one_shot_bytes, int ring_bytes, int fallback_bytes,"
      " float timeout, int first_epoch, Tensor ledger) -> Tensor");
  m.def("_v1_attach(str group_name, Tensor handles) -> str");
  m.def("_v1_settle(str group_name, bool agreed, str reason) -> ()");
  m.def("_v1_fault(str group_name) -> str");
  m.def("_v1_begin_capture(str group_name) -> ()");
  m.def("_v1_end_capture(str group_name) -> Tensor");
  m.def("_v1_register(str group_name, Tensor handles) -> str");
  m.def("_v1_counts(str group_name) -> int[]");
}

// Importing the library is what registers the ops; the module itself is empty.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
