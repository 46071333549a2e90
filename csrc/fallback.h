// NCCL or gloo by group name, through torch's own functional collectives: what serves where nothing of this package
// does, on every device. Promises no summation order. A call waits as long as the group's own timeout says; on CUDA it
// blocks the caller's stream, not the host.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "tensor.h"

namespace sgl_comm::fallback {

// An error where torch has no reduction of this name.
void check_reduce_op(const char* op, const std::string& reduce_op);

// A fresh row-major tensor: `reduce_op` over every rank's input.
Tensor all_reduce(const char* op, const Tensor& input, const std::string& group_name, const std::string& reduce_op);

// A fresh row-major tensor: the sums of this rank's share of the rows.
Tensor reduce_scatter(const char* op, const Tensor& input, const std::string& group_name, int world);

// A fresh row-major tensor: every rank's rows, bit for bit.
Tensor all_gather(const char* op, const Tensor& input, const std::string& group_name, int world);

// A fresh row-major tensor: rank src's input, bit for bit.
Tensor broadcast(const char* op, const Tensor& input, int64_t src, const std::string& group_name, int rank);

// How broadcast_in_pieces() goes about it.
struct Pieces {
  int64_t bytes;                                  // of a piece; alike on all ranks
  std::function<void()> before_start;             // called ahead of each piece
  std::function<void(int64_t, int64_t)> arrived;  // given the first and the last byte of each piece, in order
};

// Rank src's bytes into the others' row-major memory, in pieces, two of which are under way at once. The callbacks run
// without the GIL.
void broadcast_in_pieces(const char* op, const Tensor& memory, int64_t src, const std::string& group_name,
                         const Pieces& how);

// How long calls of the group's own backend that begin from now on may last.
void limit_waits(const char* op, const std::string& group_name, double seconds);

}  // namespace sgl_comm::fallback
