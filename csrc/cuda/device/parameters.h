// What each kernel is launched with: plain structs of pointers and numbers, passed by value. The host's compiler reads
// this too.
#pragma once

#include <cstdint>

#include "cuda/device/sizes.h"
#include "cuda/device/view.h"
#include "norm.h"
#include "strides.h"

namespace sgl_comm::device {

// What a kernel knows of a push workspace: the group, and how large each bank is.
struct PushView {
  GroupView group;
  uint32_t bank_bytes;  // what a launch leaves full is counted in packs, of which a word holds 2^30
};

// Of the push kernels that sum or gather.
struct Message {
  PushView view;
  const void* in;
  void* out;            // an all-reduce's may be `in`
  int64_t count;        // elements of `in`
  int64_t shard_count;  // elements of the input that go to one rank; all but the last shards are full
  int64_t num_packs;    // of the input, or of a shard where the kernel works by shards
  Op op;
  bool defer;  // leave the bank full for the next launch to empty
};

struct BroadcastMessage {
  PushView view;
  const void* in;    // on the source alone
  void* out;         // null on a source whose result is `in`
  int64_t count;     // elements
  int64_t num_rows;  // of kRowData packs
  int source, world;
};

// Strides of both tensors, either of which may be row-major: of a launch that walks them (layout.cuh).
template <typename Message>
struct WithStrides : Message {
  Strides in_strides, out_strides;
};

// Where each rank's input of one captured call lies, as mapped here. All null until it has been filled in.
struct PullEntry {
  const void* input[kMaxRanks];
};

// Offsets in every rank's workspace.
struct PullView {
  GroupView group;
  int64_t staging;
  int64_t sums;
};

struct PullMessage {
  PullView view;
  const void* in;
  void* out;               // may be `in` if `stage`
  const PullEntry* entry;  // null: every rank's input is in its staging place
  int64_t count;           // elements
  int64_t num_packs;       // of the input, or of a shard in two-shot
  bool stage;              // this rank's input is to be copied to its staging place
};

// `hidden` weights or biases of a norm, of the rows' dtype or of fp32; null is none.
struct Weights {
  const void* data;
  bool wide;
};

// Rows one after the other, each a block's: new_residual = sums + residual, normed = its norm. Any length of a row; a
// block has row_slots(hidden) threads. Each thread reads back only what it has itself written.
struct NormMessage {
  const void* sums;
  const void* residual;
  Weights weight, bias;
  void* normed;  // may be `sums`
  void* new_residual;
  int64_t hidden;
  RowLength length;
  Norm norm;
};

// Of the fused all-reduce and norm. Rows of `hidden` elements, a multiple of kGroup; every array is 16-byte aligned.
struct LayerNormMessage {
  PushView view;
  const void* in;
  const void* residual;
  Weights weight, bias;
  void* normed;
  void* new_residual;
  int rows, hidden;
  int shard_packs;  // two-shot: packs of the message that are each rank's to sum
  RowLength length;
  Norm norm;
  bool defer;  // leave the bank full for the next launch to empty
  bool late;   // the next launch may begin only when this one is nearly done, which leaves room for more blocks
};

}  // namespace sgl_comm::device
