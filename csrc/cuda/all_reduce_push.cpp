#include "cuda/all_reduce_push.h"

#include "cuda/launch.h"
#include "cuda/push_kernels.h"
#include "policy.h"

namespace sgl_comm::cuda {

namespace {

// How much of a bank a ring's block takes, of one sender: one_shot_ring two packs a thread, two_shot_ring one in each
// of its stages.
constexpr int64_t kRingBlockBytes = 2 * device::kRingPlaces * device::kPackBytes * device::kMaxThreads;
static_assert(kRingBlockBytes == CommunicatorV2::kMinSlotBytes);

Shape shape_for(const CommunicatorV2& comm, Algorithm algorithm, int64_t packs) {
  const Residency& limits = comm.limits();
  const int64_t ring_blocks = comm.most_ring_blocks(kRingBlockBytes);
  switch (algorithm) {
    case Algorithm::kOneShot:
      return limits.shape(Kind::kOneShot, packs, one_shot_threads(comm.world(), packs));
    case Algorithm::kTwoShot:
      return limits.shape(Kind::kTwoShot, packs * comm.world(), two_shot_threads(packs * comm.world()));
    case Algorithm::kOneShotRing:
      return limits.shape(Kind::kRing, (packs + 1) / 2, device::kMaxThreads, ring_blocks);
    default:
      return limits.shape(Kind::kRing, packs, device::kMaxThreads, ring_blocks);
  }
}

}  // namespace

void push_all_reduce(const char* op, CommunicatorV2& comm, const Tensor& in, Tensor& out, const std::string& algo) {
  check_usable(op, comm, in);
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t count = in.numel(), bytes = count * size_of(dtype);
  const Algorithm algorithm = choose(op, algo, bytes, comm.world(), comm.bank_bytes(), comm.thresholds());
  if (count == 0) return;
  const bool one_shot = algorithm == Algorithm::kOneShot || algorithm == Algorithm::kOneShotRing;
  const bool ring = algorithm == Algorithm::kOneShotRing || algorithm == Algorithm::kTwoShotRing;
  const int64_t num_packs = one_shot ? packs_of(bytes) : shard_packs_of(bytes, comm.world());
  const int64_t shard_count = one_shot ? 0 : num_packs * device::kPackBytes / size_of(dtype);
  const device::Message message{comm.view(), in.const_data_ptr(), out.mutable_data_ptr(), count,
                                shard_count, num_packs,           device::kAllReduce,     push_defers(bytes)};
  const bool whole = aligned(message.in, device::kPackBytes) && aligned(message.out, device::kPackBytes) &&
                     bytes % device::kPackBytes == 0;
  const Shape shape = shape_for(comm, algorithm, num_packs);
  const Rounds rounds = ring                                                 ? Rounds::kRing
                        : int64_t{shape.blocks} * shape.threads >= num_packs ? Rounds::kOne
                                                                             : Rounds::kMany;
  const PushKernel kernel = one_shot ? one_shot_kernel(dtype, comm.world(), whole, rounds)
                                     : two_shot_kernel(dtype, comm.world(), whole, ring);
  launch_in_order(op, comm, kernel, shape, message);
}

bool push_strided_all_reduce(const char* op, CommunicatorV2& comm, const Tensor& in, Tensor& out) {
  if (is_row_major(in) && is_row_major(out)) return false;
  const int64_t bytes = num_bytes(in);
  const Algorithm algorithm = choose(op, "auto", bytes, comm.world(), comm.bank_bytes(), comm.thresholds());
  if (algorithm != Algorithm::kOneShot || bytes == 0) return false;
  const DType dtype = dtype_of(in.scalar_type());
  const auto from = strides_of(in, size_of(dtype)), to = strides_of(out, size_of(dtype));
  if (!from || !to) return false;
  check_usable(op, comm, in);
  const int64_t num_packs = packs_of(bytes);
  const device::WithStrides<device::Message> message{{comm.view(), in.const_data_ptr(), out.mutable_data_ptr(),
                                                      in.numel(), 0, num_packs, device::kAllReduce, push_defers(bytes)},
                                                     *from,
                                                     *to};
  const Shape shape = comm.limits().shape(Kind::kStrided, num_packs, one_shot_threads(comm.world(), num_packs));
  launch_in_order(op, comm, strided_one_shot_kernel(dtype, comm.world()), shape, message);
  return true;
}

}  // namespace sgl_comm::cuda
