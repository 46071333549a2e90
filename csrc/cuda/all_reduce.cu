// all_reduce between GPUs: one-shot push for what fits a slot, a ring of pushes for what does not.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <string>

#include "cuda/all_reduce.h"
#include "cuda/cuda_check.h"
#include "cuda/device/push.cuh"
#include "cuda/groups.h"
#include "dispatch.h"
#include "fallback.h"
#include "inference_only.h"
#include "policy.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

using device::GroupView;
using device::kPackBytes;

constexpr uint32_t kOpAllReduce = 1;
constexpr int kMaxThreads = 512;

struct Message {
  GroupView group;
  const void* in;
  void* out;  // may be `in`
  int64_t count;
  int64_t num_packs;
};

// The group has failed, now or before: NaN for the caller in all that this thread owns, and a word for the host.
template <typename T, int kWorld, bool kWhole>
__device__ __forceinline__ void give_up(const Message& m, int64_t first, int64_t stride, unsigned long long epoch,
                                        int missing) {
#pragma unroll 1
  for (int64_t i = first; i < m.num_packs; i += stride) {
    device::store_pack<T, kWhole>(m.out, m.count, i, device::sentinel_pack());
  }
  device::fail_group(m.group, kWorld, missing, kOpAllReduce, epoch);
}

// Every rank pushes all its packs to every peer, then sums what it was sent. A thread owns the same packs on every
// rank.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) one_shot_kernel(const __grid_constant__ Message m) {
  const int first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
  const int num_packs = static_cast<int>(m.num_packs);
  ptx::wait_for_previous_kernel();
  uint4 own{};
  if (first < num_packs) own = device::load_pack<T, kWhole>(m.in, m.count, first);
  const device::Start start = device::read_start(m.group);
  const auto pack = [&](int i) { return i == first ? own : device::load_pack<T, kWhole>(m.in, m.count, i); };
  int missing = start.abort == 0 ? -1 : m.group.rank;
  if (start.abort == 0) {
    for (int i = first; i < num_packs; i += stride) {
      device::push_to_peers<kWorld>(m.group, start.epoch, int64_t{i} * kPackBytes, pack(i));
    }
    ptx::launch_next_kernel();
    for (int i = first; i < num_packs; i += stride) {
      uint4 sum;
      missing = device::receive_and_sum<T, kWorld>(m.group, start.epoch, int64_t{i} * kPackBytes, pack(i), sum);
      if (missing >= 0) break;
      device::store_pack<T, kWhole>(m.out, m.count, i, sum);
    }
  }
  if (missing >= 0) give_up<T, kWorld, kWhole>(m, first, stride, start.epoch, missing);
  device::advance_epoch(m.group);
}

// The ring: a block takes every gridDim.x-th tile and has kRingTiles places in each slot, wholly in this epoch's half.
// One tile is pushed ahead of the one that is polled. Tile k + 4 goes where tile k was: its sender has by then received
// tile k + 2, which the peer pushed after it had emptied tile k's place (the fence between the two is the release, the
// sender's own fence the acquire). With one tile ahead, three places would not do.
constexpr int kRingTiles = 4;
constexpr int kTilePacksPerThread = 2;
constexpr int kRingThreads = 512;
constexpr int64_t kTilePacks = kTilePacksPerThread * kRingThreads;
constexpr int64_t kRingBytes = kRingTiles * kTilePacks * kPackBytes;  // of a block, in each slot
static_assert(kRingBytes == CommunicatorV2::kMinSlotBytes);

template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kRingThreads) ring_kernel(const __grid_constant__ Message m) {
  ptx::wait_for_previous_kernel();
  const device::Start start = device::read_start(m.group);
  const int64_t stride = int64_t{gridDim.x} * kTilePacks;
  const int64_t first = blockIdx.x * kTilePacks + threadIdx.x;
  const auto place_of = [&](int64_t k, int u) {
    return blockIdx.x * kRingBytes + ((k % kRingTiles) * kTilePacks + u * kRingThreads + threadIdx.x) * kPackBytes;
  };
  uint4 pushed[kTilePacksPerThread], own[kTilePacksPerThread];
  int missing = start.abort == 0 ? -1 : m.group.rank;
  for (int64_t k = 0; missing < 0 && first + (k - 1) * stride < m.num_packs; ++k) {
#pragma unroll
    for (int u = 0; u < kTilePacksPerThread; ++u) {
      own[u] = pushed[u];
      const int64_t i = first + k * stride + u * kRingThreads;
      if (i >= m.num_packs) continue;
      pushed[u] = device::load_pack<T, kWhole>(m.in, m.count, i);
      device::push_to_peers<kWorld>(m.group, start.epoch, place_of(k, u), pushed[u]);
    }
    if (k == 0) continue;
#pragma unroll
    for (int u = 0; u < kTilePacksPerThread; ++u) {
      const int64_t i = first + (k - 1) * stride + u * kRingThreads;
      if (i >= m.num_packs || missing >= 0) continue;
      uint4 sum;
      missing = device::receive_and_sum<T, kWorld>(m.group, start.epoch, place_of(k - 1, u), own[u], sum);
      device::store_pack<T, kWhole>(m.out, m.count, i, sum);
    }
    ptx::fence_acq_rel_sys();
  }
  ptx::launch_next_kernel();
  if (missing >= 0) {
#pragma unroll 1
    for (int u = 0; u < kTilePacksPerThread; ++u) {
      give_up<T, kWorld, kWhole>(m, first + u * kRingThreads, stride, start.epoch, missing);
    }
  }
  device::advance_epoch(m.group);
}

using Kernel = void (*)(Message);

template <DType kType>
using DeviceType = std::conditional_t<kType == DType::kFloat32, device::Float32,
                                      std::conditional_t<kType == DType::kBFloat16, device::BFloat16, device::Float16>>;

Kernel kernel_for(Algorithm algorithm, DType dtype, int world, bool whole) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_world(world, [&](auto n) -> Kernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (algorithm == Algorithm::kOneShot) {
        return whole ? one_shot_kernel<T, kWorld, true> : one_shot_kernel<T, kWorld, false>;
      }
      return whole ? ring_kernel<T, kWorld, true> : ring_kernel<T, kWorld, false>;
    });
  });
}

// Grid and block are functions of the message and of limits agreed at init, so that every rank maps packs alike.
struct Shape {
  unsigned blocks;
  unsigned threads;
};

Shape shape_for(Algorithm algorithm, int64_t num_packs, int64_t slot_bytes, const Residency& limits) {
  const auto blocks = [](int64_t wanted, int64_t limit) {
    const int64_t rounds = (wanted + limit - 1) / limit;  // every block the same number of them
    return static_cast<unsigned>((wanted + rounds - 1) / rounds);
  };
  if (algorithm == Algorithm::kRing) {
    const int64_t limit = std::min<int64_t>(limits.blocks[Residency::kRing512], slot_bytes / kRingBytes);
    return {blocks((num_packs + kTilePacks - 1) / kTilePacks, limit), kRingThreads};
  }
  // Up to 16 KiB few blocks are best, to 256 KiB many small ones, above that large ones again
  // (benchmarks/bench_all_reduce.py).
  constexpr int64_t kFewBlocksPacks = 1 << 10, kManyBlocksPacks = 16 << 10;
  if (num_packs <= kMaxThreads) return {1, static_cast<unsigned>((num_packs + 31) / 32 * 32)};
  if (num_packs > kFewBlocksPacks && num_packs <= kManyBlocksPacks &&
      (num_packs + 127) / 128 <= limits.blocks[Residency::kOneShot128]) {
    return {static_cast<unsigned>((num_packs + 127) / 128), 128};
  }
  return {blocks((num_packs + kMaxThreads - 1) / kMaxThreads, limits.blocks[Residency::kOneShot512]), kMaxThreads};
}

void launch(const char* op, const CommunicatorV2& comm, Algorithm algorithm, DType dtype, const Message& message,
            cudaStream_t stream) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % kPackBytes == 0; };
  const bool whole = aligned(message.in) && aligned(message.out) && message.count * size_of(dtype) % kPackBytes == 0;
  const Shape shape = shape_for(algorithm, message.num_packs, message.group.slot_bytes, comm.limits());
  cudaLaunchConfig_t config{};
  config.gridDim = shape.blocks;
  config.blockDim = shape.threads;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = comm.dependent_launch() ? 1 : 0;
  SGL_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel_for(algorithm, dtype, comm.world(), whole), message));
}

// Sums `in` over the ranks into `out`, on the current stream of the tensors' device.
void sum_over_ranks(const char* op, const CommunicatorV2& comm, const Tensor& in, Tensor& out,
                    const std::string& algo) {
  SGL_CHECK(!comm.failed(), op, ": ", comm.fault());
  SGL_CHECK(in.get_device_index() == comm.device(), op, ": got ", describe(in), ":", in.get_device_index(),
            "; expected device cuda:", comm.device(), ", which the group was initialised with");
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t count = in.numel(), bytes = count * size_of(dtype);
  const Algorithm algorithm = choose(op, algo, bytes, comm.view().slot_bytes);
  if (count == 0) return;
  const DeviceScope scope(comm.device());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(comm.device(), &stream));
  const Message message{comm.view(), in.const_data_ptr(), out.mutable_data_ptr(), count,
                        (bytes + kPackBytes - 1) / kPackBytes};
  launch(op, comm, algorithm, dtype, message, static_cast<cudaStream_t>(stream));
}

Groups::GroupPtr check(const char* op, const Tensor& input, const std::string& group_name) {
  check_strided(op, input);
  check_inference_only(op, input);
  return groups().find(op, group_name);
}

bool v2_serves(const Groups::GroupPtr& group, const Tensor& input, const std::string& reduce_op) {
  return group->communicator != nullptr && reduce_op == "sum" && dtype_of(input.scalar_type()) != DType::kOther;
}

Tensor all_reduce(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  const auto group = check("all_reduce", input, group_name);
  fallback::check_reduce_op("all_reduce", reduce_op);
  if (group->world == 1) return fresh_row_major("all_reduce", input);
  if (!v2_serves(group, input, reduce_op)) return fallback::all_reduce("all_reduce", input, group_name, reduce_op);
  Tensor out = empty_row_major("all_reduce", input);
  sum_over_ranks("all_reduce", *group->communicator, row_major(input), out, "auto");
  return out;
}

void all_reduce_(Tensor input, const Text& group_name, const Text& reduce_op) {
  const auto group = check("all_reduce_", input, group_name);
  fallback::check_reduce_op("all_reduce_", reduce_op);
  in_place("all_reduce_", input, [&](Tensor& x) {
    if (group->world == 1) return;
    if (v2_serves(group, x, reduce_op)) {
      sum_over_ranks("all_reduce_", *group->communicator, x, x, "auto");
    } else {
      torch::stable::copy_(x, fallback::all_reduce("all_reduce_", x, group_name, reduce_op));
    }
  });
}

Tensor custom_all_reduce_v2(const Tensor& input, const Text& group_name, const Text& algo) {
  const auto group = check("custom_all_reduce_v2", input, group_name);
  SGL_CHECK(dtype_of(input.scalar_type()) != DType::kOther, "custom_all_reduce_v2: got ", describe(input),
            "; expected float32, bfloat16 or float16 (sgl_comm::all_reduce takes every dtype)");
  if (group->world == 1) {
    choose("custom_all_reduce_v2", algo, 0, 0);  // refuses an unknown name, as at any other world size
    return fresh_row_major("custom_all_reduce_v2", input);
  }
  SGL_CHECK(group->communicator != nullptr, "custom_all_reduce_v2: the push kernels do not serve group '", group_name,
            "' (its Communicator's `reason` says why); sgl_comm::all_reduce does");
  Tensor out = empty_row_major("custom_all_reduce_v2", input);
  sum_over_ranks("custom_all_reduce_v2", *group->communicator, row_major(input), out, algo);
  return out;
}

}  // namespace

Residency load_all_reduce_kernels(int world) {
  int device = 0, processors = 0;
  SGL_CUDA_CHECK("init", cudaGetDevice(&device));
  SGL_CUDA_CHECK("init", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  Residency fewest{{INT_MAX, INT_MAX, INT_MAX}, true};
  const auto count = [&](Residency::Kind kind, Kernel kernel, int threads) {
    int blocks = 0;  // of one multiprocessor; asking is what loads the kernel
    SGL_CUDA_CHECK("init", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, 0));
    fewest.blocks[kind] = std::min(fewest.blocks[kind], blocks * processors);
    cudaFuncAttributes attributes{};
    SGL_CUDA_CHECK("init", cudaFuncGetAttributes(&attributes, kernel));
    fewest.dependent_launch &= attributes.ptxVersion >= 90;
  };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool whole : {true, false}) {
      const Kernel one_shot = kernel_for(Algorithm::kOneShot, dtype, world, whole);
      count(Residency::kOneShot128, one_shot, 128);
      count(Residency::kOneShot512, one_shot, kMaxThreads);
      count(Residency::kRing512, kernel_for(Algorithm::kRing, dtype, world, whole), kRingThreads);
    }
  }
  return fewest;
}

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::cuda::all_reduce));
  m.impl("all_reduce_", TORCH_BOX(&sgl_comm::cuda::all_reduce_));
  m.impl("custom_all_reduce_v2", TORCH_BOX(&sgl_comm::cuda::custom_all_reduce_v2));
}
