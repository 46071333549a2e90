// The launch parameters of each kernel: plain structs of pointers and numbers, passed by value. The host's compiler
// reads this too.
#pragma once

#include <cstdint>

#include "cuda/device/sizes.h"
#include "cuda/device/view.h"
#include "norm.h"
#include "strides.h"

namespace sgl_comm::device {

// A push workspace as a kernel sees it: the group, and how large each buffer is.
struct PushView {
  GroupView group;
  uint32_t buffer_bytes;
};

// Parameters of the push kernels that sum or gather.
struct PushParameters {
  PushView view;
  const void* in;
  void* out;            // may be `in` in an all-reduce
  int64_t count;        // elements of `in`
  int64_t shard_count;  // elements of the input that go to one rank; all but the last shards are full
  int64_t num_packs;    // of the input, or of a shard where the kernel works by shards
  Op op;
  bool defer;  // leave the buffer full for the next launch to empty
};

// The parameters of a launch that walks strided tensors (layout.cuh): the strides of both; either may be row-major.
template <typename Parameters>
struct WithStrides : Parameters {
  Strides in_strides, out_strides;
};

// Where each rank's input of one captured call lies, as mapped on this rank. All null until it has been filled in.
struct PullEntry {
  const void* input[kMaxWorld];
};

// A pull workspace as a kernel sees it: the group, and two offsets in every rank's workspace.
struct PullView {
  GroupView group;
  int64_t staging;  // of the staging area
  int64_t sums;     // of the area for sums
};

struct PullParameters {
  PullView view;
  const void* in;
  void* out;               // may be `in` if `stage`
  const PullEntry* entry;  // null: every rank's input is in its staging area
  int64_t count;           // elements
  int64_t num_packs;       // of the input, or of a shard in two-shot
  bool stage;              // this rank's input must be copied to its staging area
};

// `hidden` weights or biases of a norm, of the rows' dtype or, if `wide`, of fp32; null is none.
struct Weights {
  const void* data;
  bool wide;
};

// Rows one after the other, each a block's: new_residual = sums + residual, normed = its norm. Any length of a row; a
// block has row_partials(hidden) threads. Each thread reads back only what it has itself written.
struct NormParameters {
  const void* sums;
  const void* residual;
  Weights weight, bias;
  void* normed;  // may be `sums`
  void* new_residual;
  int64_t hidden;
  RowLength length;
  Norm norm;
};

}  // namespace sgl_comm::device
