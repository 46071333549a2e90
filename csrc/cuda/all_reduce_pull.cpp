#include "cuda/all_reduce_pull.h"

#include <algorithm>

#include "cuda/launch.h"
#include "cuda/pull_kernels.h"
#include "policy.h"

namespace sgl_comm::cuda {

namespace {

constexpr unsigned kThreads = 512;

// One launch: at most as much as a staging place holds, so that each rank may decide alone whether it needs its own.
void pull_piece(const char* op, CommunicatorV1& comm, DType dtype, const std::byte* in, std::byte* out, int64_t count,
                cudaStream_t stream) {
  const int64_t bytes = count * size_of(dtype);
  const bool one_shot = comm.world() == 2 || bytes <= comm.thresholds().one_shot_bytes;
  const int64_t num_packs = one_shot ? packs_of(bytes) : shard_packs_of(bytes, comm.world());
  const bool whole =
      aligned(in, device::kPackBytes) && aligned(out, device::kPackBytes) && bytes % device::kPackBytes == 0;
  const Shape shape = comm.limits().shape(Kind::kPull, num_packs, kThreads, device::kMaxPullBlocks);

  const auto turn = comm.order().next(op, stream);
  device::PullMessage message{comm.view(), in, out, nullptr, count, num_packs, true};
  GraphInputs& inputs = comm.graph_inputs();
  if (turn.capture.id != 0 && inputs.noting()) {
    // Peers read whole packs; and while they read, nobody may write.
    message.stage = !whole || in == out || !GraphInputs::can_be_shared(in);
    message.entry = inputs.note(op, turn.capture, message.stage ? nullptr : in, bytes, static_cast<int32_t>(dtype));
  }
  launch(op, pull_kernel(dtype, comm.world(), whole, one_shot), shape, stream,
         turn.same_stream && comm.limits().dependent_launch, message);
}

}  // namespace

void pull_all_reduce(const char* op, CommunicatorV1& comm, const Tensor& in, Tensor& out) {
  check_usable(op, comm, in);
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t count = in.numel(), piece = comm.staging_bytes() / static_cast<int64_t>(size_of(dtype));
  const auto* from = static_cast<const std::byte*>(in.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  const DeviceScope scope(comm.device());
  const cudaStream_t stream = current_stream(comm.device());
  if (count > 0) comm.count_call();
  for (int64_t first = 0; first < count; first += piece) {
    const int64_t offset = first * static_cast<int64_t>(size_of(dtype));
    pull_piece(op, comm, dtype, from + offset, to + offset, std::min(piece, count - first), stream);
  }
}

}  // namespace sgl_comm::cuda
