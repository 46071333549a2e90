#include "cuda/all_reduce_push.h"

#include "cuda/kernels/push_kernels.h"
#include "cuda/launch.h"
#include "policy.h"

namespace sgl_comm::cuda {

namespace {

// How many bytes of one sender's part of a buffer a block of a ring needs: two packs a thread in one_shot_ring, one in
// each of the two stages of two_shot_ring.
constexpr int64_t kRingBlockBytes = 2 * device::kRingSlots * device::kPackBytes * device::kMaxThreads;
static_assert(kRingBlockBytes == PushCommunicator::kMinSize);

Shape shape_for(const PushCommunicator& comm, Algorithm algorithm, int64_t packs) {
  const Residency& limits = comm.limits();
  const int64_t ring_blocks = comm.most_ring_blocks(kRingBlockBytes);
  switch (algorithm) {
    case Algorithm::kOneShot:
      return limits.shape(KernelKind::kOneShot, packs, one_shot_threads(comm.world(), packs));
    case Algorithm::kTwoShot:
      return limits.shape(KernelKind::kTwoShot, packs * comm.world(), two_shot_threads(packs * comm.world()));
    case Algorithm::kOneShotRing:
      return limits.shape(KernelKind::kRing, (packs + 1) / 2, device::kMaxThreads, ring_blocks);
    case Algorithm::kTwoShotRing:
      return limits.shape(KernelKind::kRing, packs, device::kMaxThreads, ring_blocks);
  }
  fail("sgl_comm: no shape for algorithm number ", static_cast<int>(algorithm));
}

device::PushParameters parameters_for(const PushCommunicator& comm, const Tensor& in, Tensor& out, bool one_shot) {
  const int64_t element_bytes = size_of(dtype_of(in.scalar_type())), bytes = in.numel() * element_bytes;
  device::PushParameters parameters{};
  parameters.view = comm.view();
  parameters.in = in.const_data_ptr();
  parameters.out = out.mutable_data_ptr();
  parameters.count = in.numel();
  parameters.num_packs = one_shot ? packs_of(bytes) : shard_packs_of(bytes, comm.world());
  parameters.shard_count = one_shot ? 0 : parameters.num_packs * device::kPackBytes / element_bytes;
  parameters.op = Op::kAllReduce;
  parameters.defer = push_defers(bytes);
  return parameters;
}

}  // namespace

void push_all_reduce(const char* op, PushCommunicator& comm, const Tensor& in, Tensor& out, const std::string& algo) {
  check_usable(op, comm, in);
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t count = in.numel(), bytes = count * size_of(dtype);
  const Algorithm algorithm = choose(op, algo, bytes, comm.world(), comm.buffer_bytes(), comm.thresholds());
  if (count == 0) return;
  const bool one_shot = algorithm == Algorithm::kOneShot || algorithm == Algorithm::kOneShotRing;
  const bool ring = algorithm == Algorithm::kOneShotRing || algorithm == Algorithm::kTwoShotRing;
  const device::PushParameters parameters = parameters_for(comm, in, out, one_shot);
  const int64_t num_packs = parameters.num_packs;
  const bool aligned = is_aligned(parameters.in, device::kPackBytes) &&
                       is_aligned(parameters.out, device::kPackBytes) && bytes % device::kPackBytes == 0;
  const Shape shape = shape_for(comm, algorithm, num_packs);
  const Rounds rounds = ring                                                 ? Rounds::kRing
                        : int64_t{shape.blocks} * shape.threads >= num_packs ? Rounds::kOne
                                                                             : Rounds::kMany;
  const PushKernel kernel = one_shot ? one_shot_kernel(dtype, comm.world(), aligned, rounds)
                                     : two_shot_kernel(dtype, comm.world(), aligned, ring);
  launch_in_order(op, comm, kernel, shape, parameters);
}

bool push_strided_all_reduce(const char* op, PushCommunicator& comm, const Tensor& in, Tensor& out) {
  if (is_row_major(in) && is_row_major(out)) return false;
  const int64_t bytes = num_bytes(in);
  const Algorithm algorithm = choose(op, "auto", bytes, comm.world(), comm.buffer_bytes(), comm.thresholds());
  if (algorithm != Algorithm::kOneShot || bytes == 0) return false;
  const DType dtype = dtype_of(in.scalar_type());
  const auto from = strides_of(in, size_of(dtype)), to = strides_of(out, size_of(dtype));
  if (!from || !to) return false;
  check_usable(op, comm, in);
  const device::WithStrides<device::PushParameters> parameters{parameters_for(comm, in, out, true), *from, *to};
  const int64_t num_packs = parameters.num_packs;
  const Shape shape = comm.limits().shape(KernelKind::kStrided, num_packs, one_shot_threads(comm.world(), num_packs));
  launch_in_order(op, comm, strided_one_shot_kernel(dtype, comm.world()), shape, parameters);
  return true;
}

}  // namespace sgl_comm::cuda
