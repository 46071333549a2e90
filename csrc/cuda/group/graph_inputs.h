// The inputs of captured calls, as every rank finds them: a table on the device with an entry a launch, filled in after
// the capture, when the ranks have exchanged where their inputs lie.
//
// An input is shared by the allocation it lies in: one handle a base, opened by each peer once, however many inputs lie
// in it. A base is known by its address and the driver's id of the buffer, since an address may be freed and used
// again. A graph holds its entries and mappings as long as it lives, as the driver reports (by a user object of the
// graph); what a dropped graph held is given back at the next capture.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/device/parameters.h"
#include "cuda/group/device_group.h"
#include "cuda/group/stream_order.h"

namespace sgl_comm::cuda {

// What ranks exchange of one captured launch.
struct InputHandle {
  enum State : int32_t {
    kShared,
    kStaged,   // copied to the rank's staging area
    kFreed,    // since it was noted
    kRefused,  // by the driver, for sharing
  };
  cudaIpcMemHandle_t ipc;  // of the allocation
  uint64_t base;           // its address at its owner, and the driver's id of it
  uint64_t buffer_id;
  int64_t offset;  // of the input in it
  int64_t bytes;
  int32_t dtype;
  State state;
};

class GraphInputs {
 public:
  GraphInputs(int rank, int world, int device) : rank_(rank), world_(world), device_(device) {}
  ~GraphInputs();
  GraphInputs(const GraphInputs&) = delete;
  GraphInputs& operator=(const GraphInputs&) = delete;

  void attach(const DeviceGroup& group, int64_t staging_offset);

  // From begin() to end() captured launches are noted. end() returns the handles for the peers, in the order of the
  // calls.
  void begin();
  bool noting() const { return noting_; }
  std::vector<InputHandle> end();
  // With the handles of all ranks, rank by rank: fills the table in. Empty, or why this rank cannot.
  std::string fill_in(const std::vector<InputHandle>& handles);

  // Notes a captured launch. `input` is null where this rank copies it to its staging area.
  const device::PullEntry* note(const char* op, const Capture& capture, const void* input, int64_t bytes,
                                int32_t dtype);
  // Whether peers can open the allocation that this lies in.
  static bool can_be_shared(const void* input);

  // For tests: mappings open now, opened ever, closed ever, entries in use.
  std::vector<int64_t> counts() const;

 private:
  static constexpr int kMaxEntries = 1 << 16;

  using Base = std::tuple<int, uint64_t, uint64_t>;  // rank, address, id
  struct Mapping {
    void* address;
    int users;  // graphs
    bool opened;
  };
  // What one captured graph holds.
  struct Graph {
    unsigned long long capture_id;
    std::shared_ptr<std::atomic<bool>> dropped;
    std::vector<int> entries;
    std::vector<Base> bases;
  };
  struct Noted {
    int entry;
    unsigned long long capture_id;
    InputHandle handle;
  };

  Graph& graph_of(const char* op, const Capture& capture);
  void release_dropped();
  void release(const Base& base);
  void* open(const Base& base, const InputHandle& handle);

  const int rank_;
  const int world_;
  const int device_;
  const DeviceGroup* group_ = nullptr;
  int64_t staging_offset_ = 0;
  bool noting_ = false;
  device::PullEntry* table_ = nullptr;
  std::vector<int> free_entries_;
  std::vector<Graph> graphs_;
  std::vector<Noted> noted_;
  std::map<Base, Mapping> mappings_;
  int64_t num_opened_ = 0;
  int64_t num_closed_ = 0;
};

}  // namespace sgl_comm::cuda
