#include "cuda/all_reduce_pull.h"

#include <algorithm>

#include "cuda/kernels/pull_kernels.h"
#include "cuda/launch.h"
#include "policy.h"

namespace sgl_comm::cuda {

namespace {

constexpr unsigned kThreads = 512;

// What one launch sums: at most as much as a staging area holds, so that each rank may decide alone whether to copy its
// input there.
struct Piece {
  DType dtype;
  const std::byte* in;
  std::byte* out;
  int64_t count;
};

void pull_piece(const char* op, PullCommunicator& comm, const Piece& piece, cudaStream_t stream) {
  const int64_t bytes = piece.count * size_of(piece.dtype);
  const bool one_shot = comm.world() == 2 || bytes <= comm.thresholds().one_shot_bytes;
  const bool aligned = is_aligned(piece.in, device::kPackBytes) && is_aligned(piece.out, device::kPackBytes) &&
                       bytes % device::kPackBytes == 0;
  device::PullParameters parameters{};
  parameters.view = comm.view();
  parameters.in = piece.in;
  parameters.out = piece.out;
  parameters.count = piece.count;
  parameters.num_packs = one_shot ? packs_of(bytes) : shard_packs_of(bytes, comm.world());
  parameters.stage = true;
  const Shape shape = comm.limits().shape(KernelKind::kPull, parameters.num_packs, kThreads, device::kMaxPullBlocks);

  const auto turn = comm.order().next(op, stream);
  GraphInputs& inputs = comm.graph_inputs();
  if (turn.capture.id != 0 && inputs.noting()) {
    // Peers read full packs; and while they read, nobody may write.
    parameters.stage = !aligned || piece.in == piece.out || !GraphInputs::can_be_shared(piece.in);
    parameters.entry =
        inputs.note(op, turn.capture, parameters.stage ? nullptr : piece.in, bytes, static_cast<int32_t>(piece.dtype));
  }
  launch(op, pull_kernel(piece.dtype, comm.world(), aligned, one_shot), shape, stream,
         turn.same_stream && comm.limits().dependent_launch, parameters);
}

}  // namespace

void pull_all_reduce(const char* op, PullCommunicator& comm, const Tensor& in, Tensor& out) {
  check_usable(op, comm, in);
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t count = in.numel(), limit = comm.staging_bytes() / static_cast<int64_t>(size_of(dtype));
  const auto* from = static_cast<const std::byte*>(in.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  const DeviceScope scope(comm.device());
  const cudaStream_t stream = current_stream(comm.device());
  if (count > 0) comm.count_call();
  for (int64_t first = 0; first < count; first += limit) {
    const int64_t offset = first * static_cast<int64_t>(size_of(dtype));
    pull_piece(op, comm, {dtype, from + offset, to + offset, std::min(limit, count - first)}, stream);
  }
}

}  // namespace sgl_comm::cuda
