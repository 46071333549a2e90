// Every op of the package, once: the ids and names by which calls are compared and faults reported, and the schemas,
// each with a line of meaning. Plain: kernels read this too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sgl_comm {

// What a call is, for the ranks that compare calls and for the words of a fault. Kernels report it to the host.
enum class Op : uint32_t {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kCustomAllReduceV1,
  kAllReduceLayerNorm,
  kBroadcast,
  kCfgAllReduce,
  kGrafterBroadcast,
  kCompareCalls,
};

// In the order of the ids.
constexpr const char* kOpNames[] = {
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "custom_all_reduce_v1",
    "tp_attn_all_reduce_and_layernorm",
    "cfg_broadcast",
    "cfg_all_reduce",
    "grafter_broadcast_",
    "the comparison of calls (SGLCOMM_CHECK)",
};
constexpr size_t kNumOps = sizeof kOpNames / sizeof *kOpNames;
static_assert(static_cast<size_t>(Op::kCompareCalls) + 1 == kNumOps, "each op id has a name");

constexpr const char* name_of(Op op) { return kOpNames[static_cast<size_t>(op)]; }

constexpr const char* kSchemas[] = {
    // The front door: the sum (or `reduce_op`) of every rank's input, fresh and row-major. Always right: push or pull
    // kernels, or shared memory, where they serve the group and dtype; else NCCL or gloo.
    "all_reduce(Tensor input, str group_name, str reduce_op=\"sum\") -> Tensor",
    // all_reduce in place, for any strides.
    "all_reduce_(Tensor(a!) input, str group_name, str reduce_op=\"sum\") -> ()",
    // Pull over peer pointers (CUDA); an error, never a fallback, where it cannot.
    "custom_all_reduce_v1(Tensor input, str group_name) -> Tensor",
    // Push through an owned workspace (CUDA); an error, never a fallback, where it cannot. algo: auto, one_shot,
    // two_shot, one_shot_ring or two_shot_ring.
    "custom_all_reduce_v2(Tensor input, str group_name, str algo=\"auto\") -> Tensor",
    // The sum of every rank's input, divided along dim 0 into a share a rank: rank r gets the r-th. Fresh and
    // row-major.
    "reduce_scatter(Tensor input, str group_name) -> Tensor",
    // Every rank's input along dim 0, in rank order, bit for bit, for every dtype. Fresh and row-major.
    "all_gather(Tensor input, str group_name) -> Tensor",
    // all_reduce for tensors of any layout, which may differ between ranks, as diffusion models have under
    // classifier-free-guidance parallelism; fresh and row-major, and in place.
    "cfg_all_reduce(Tensor input, str group_name, str reduce_op=\"sum\") -> Tensor",
    "cfg_all_reduce_(Tensor(a!) input, str group_name, str reduce_op=\"sum\") -> ()",
    // Rank src's input, bit for bit, for every dtype and layout: fresh and row-major, and in place.
    "cfg_broadcast(Tensor input, int src, str group_name) -> Tensor",
    "cfg_broadcast_(Tensor(a!) input, int src, str group_name) -> ()",
    // The sum over ranks, plus the residual, then its RMSNorm or LayerNorm along the last dimension: (normed, new
    // residual), both fresh and row-major.
    "tp_attn_all_reduce_and_layernorm(Tensor hidden_states, Tensor residual, Tensor weight, Tensor? bias, float eps,"
    " str norm=\"rms\", float weight_offset=0.0, *, str group_name) -> (Tensor, Tensor)",

    // Between two running systems that the grafter has joined: rank src's input into the others', bit for bit, for
    // every dtype and layout, in place.
    "grafter_broadcast_(Tensor(a!) input, int src, str group_name) -> ()",
    "_grafter_receive_(Tensor(a!) staging, Tensor(b!) ours, bool take, int src, str group_name) -> Tensor",
    "_grafter_compare(Tensor theirs, Tensor ours) -> Tensor",
    "_overlaps_itself(Tensor input) -> bool",
    "_limit_waits(str group_name, float seconds) -> ()",

    // Set-up and tear-down, called by sgl_comm.backends alone. A handle is a fixed-size uint8 tensor that the ranks
    // exchange over their own group; reasons and texts are empty when all is well.
    "_shm_open(str group_name, int rank, int world, bool compare_calls=False) -> ()",
    "_shm_publish(str group_name, float timeout, int first_epoch) -> Tensor",
    "_shm_attach(str group_name, Tensor handles) -> str",
    "_shm_settle(str group_name, bool agreed) -> ()",
    "_shm_fault(str group_name) -> str",
    "_shm_close(str group_name) -> ()",
    "_ledger(str group_name) -> Tensor",
    "_layout_copies() -> int",
    "_compare_calls(str group_name, str op, str text, bool refused) -> str",
    // protocol: "push" or "pull"; "" in _cuda_open and _cuda_close is the group alone, for which no kernels are tried.
    "_cuda_open(str group_name, str protocol, int rank, int world, str backend, bool compare_calls=False) -> ()",
    "_cuda_publish(str group_name, str protocol, int device, int max_size, int one_shot_bytes, int ring_bytes,"
    " int fallback_bytes, float timeout, int first_epoch, Tensor ledger) -> Tensor",
    "_cuda_attach(str group_name, str protocol, Tensor handles) -> str",
    "_cuda_settle(str group_name, str protocol, bool agreed, str reason) -> ()",
    "_cuda_fault(str group_name, str protocol) -> str",
    "_cuda_close(str group_name, str protocol) -> ()",
    "_cuda_algorithm(str group_name, int bytes) -> str",
    "_cuda_begin_capture(str group_name) -> ()",
    "_cuda_end_capture(str group_name) -> Tensor",
    "_cuda_register_inputs(str group_name, Tensor handles) -> str",
    "_cuda_mapping_counts(str group_name) -> int[]",
    "_cuda_peer_access(int device, int peer) -> int",
    "_cuda_loaded_kernels(int world) -> int[]",
};

}  // namespace sgl_comm
