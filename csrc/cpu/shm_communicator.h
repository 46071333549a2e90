// Storage for collectives between the processes of one host: one anonymous segment a group, mapped by every rank.
//
// Who writes what, when. Every collective is a sequence of steps, alike on all ranks; step e is the e-th since init
// (tests may count from another number than 0).
//   slot(r) of step e    written by rank r before it raises arrived[r] to e; read by the peers after they saw that.
//                        What lies in it is the collective's business: something for all peers, or a part a peer, or,
//                        of a broadcast's ranks but the source, nothing.
//   sums                 rank r's part written by rank r after it saw every arrived >= e and before it raises
//                        summed[r] to e; read by the peers after they saw that.
//   tensor segment of r  a segment of rank r's own, as large as a tensor; written by it after it saw every
//                        arrived >= e-1 and before it raises arrived[r] to e; read by the peers after they saw
//                        that and before they raise theirs to e+1, which has no slots. slot(r) of step e holds
//                        its handle.
// Why reuse is safe. Slots alternate between two halves: step e+2 writes where e was. A rank gets to e+2 only after it
// saw every arrived >= e+1, and a peer raises arrived to e+1 only after it has finished reading in step e. A step that
// does not wait for every peer (of a broadcast) leaves that to the next one's beginning. The sums would
// need one area only: they are written after every arrived >= e, which a peer raises after it has read those of e-1.
// They have two all the same, since lines that the peer has just read are dear to write (1 MiB: 1.25 times slower).
// Each raise is a release, each wait an acquire (flag.h).
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cpu/flag.h"
#include "cpu/tensor_segments.h"
#include "dispatch.h"
#include "group_segment.h"
#include "ledger.h"
#include "ops.h"

namespace sgl_comm {

// What a rank calls; a call must be the same on every rank, which is checked before any of its data is used.
struct Call {
  static constexpr int kCountBits = 36, kSourceBits = 4, kRefusedBits = 6, kDTypeBits = 6, kCudaCallsBits = 8;
  static constexpr int kOpBits = 64 - kCountBits - kSourceBits - kRefusedBits - kDTypeBits - kCudaCallsBits;

  Op op;
  torch::headeronly::ScalarType dtype;
  uint64_t count;      // of a rank's input
  uint8_t source = 0;  // a broadcast's, of either kind
  // Set by begin(): the last bits of how many cfg_ calls this rank has refused and, of a cfg_ call, of how many it has
  // made of CUDA tensors.
  uint8_t refused = 0, cuda_calls = 0;

  bool is_cfg() const { return op == Op::kCfgAllReduce || op == Op::kBroadcast; }
  bool has_source() const { return op == Op::kBroadcast || op == Op::kGrafterBroadcast; }

  uint64_t packed() const {
    uint64_t word = uint64_t(op);
    word = word << kCudaCallsBits | cuda_calls;
    word = word << kDTypeBits | uint64_t(dtype);
    word = word << kRefusedBits | refused;
    word = word << kSourceBits | source;
    return word << kCountBits | count;
  }
  static Call unpacked(uint64_t word) {
    const auto take = [&](int number) {
      const uint64_t bits = word & ((uint64_t{1} << number) - 1);
      word >>= number;
      return bits;
    };
    Call call{};
    call.count = take(kCountBits);
    call.source = take(kSourceBits);
    call.refused = take(kRefusedBits);
    call.dtype = torch::headeronly::ScalarType(take(kDTypeBits));
    call.cuda_calls = take(kCudaCallsBits);
    call.op = Op(word);
    return call;
  }
  // Compares two counts of which only the last `bits` bits are known: above 0 if the first is the larger.
  static int ahead(uint8_t a, uint8_t b, int bits) {
    const int difference = (a - b) & ((1 << bits) - 1);
    return difference == 0 ? 0 : difference < 1 << (bits - 1) ? 1 : -1;
  }
};
static_assert(kNumOps <= 1 << Call::kOpBits);
static_assert(kMaxWorld <= 1 << Call::kSourceBits);
static_assert(static_cast<int>(torch::headeronly::ScalarType::NumOptions) <= 1 << Call::kDTypeBits);

// What ranks exchange at init, as bytes over their own group.
struct ShmHandle {
  SegmentHandle segment;
  uint64_t first_epoch;
};

class ShmCommunicator {
 public:
  static constexpr size_t kSlotBytes = 256 << 10;

  // first_epoch: what steps are counted from.
  ShmCommunicator(std::string group_name, int rank, int world, double timeout_seconds, uint64_t first_epoch);
  ~ShmCommunicator();

  // Set-up, in this order on every rank; between the two the handles go round the group.
  ShmHandle publish();
  std::string attach(const std::vector<ShmHandle>& handles);  // empty, or why this rank cannot
  void settle() { segment_.settle(); }                        // all ranks have attached

  int rank() const { return rank_; }
  int world() const { return world_; }

  // Waits end that many seconds from now at the latest, until this is called again; `name` says in errors who says so.
  void limit_waits(double seconds, const char* name);

  // Starts a collective: no other thread's may run until the lock goes. Throws where an earlier one failed.
  std::unique_lock<std::mutex> begin(const char* op, Call call);
  // Counts a call that this rank has refused: all ranks that did so are in step still, and where others made it the
  // next call of any rank fails on all.
  void count_refusal();
  // How many collectives this rank has begun or refused.
  uint64_t sequence() const { return sequence_.load(std::memory_order_relaxed); }
  // A collective is one or more of: next_step, write slot(rank()), arrive, await every peer's arrival, read the slots;
  // and where the ranks share the summing: write sums(), announce_sum, await_sum(r), read r's part of sums().
  void next_step() {
    ++step_;
    if (__builtin_expect(behind_.has_value(), 0)) catch_up();
  }
  std::byte* slot(int rank) const { return slots_ + (2 * rank + (step_ & 1)) * kSlotBytes; }
  std::byte* sums() const { return sums_ + (step_ & 1) * kSlotBytes; }
  void arrive();
  void await_arrival(int peer);
  void await_arrivals();
  // Instead of awaiting every peer's arrival: the next step will, before its slot is written.
  void await_later();
  void announce_sum();
  void await_sum(int rank);
  TensorSegments& tensor_segments() { return tensor_segments_; }

  // Why the communicator is unusable; empty while it is not.
  std::string fault() const;

  // For the CUDA library's part of the group.
  const Ledger& ledger() const { return ledger_; }
  void share_ledger() { ledger_shared_ = true; }
  bool ledger_shared() const { return ledger_shared_; }

 private:
  enum class FaultKind : int32_t { kTimeout, kDied, kClosed, kMismatch };
  struct Fault {
    std::atomic<uint32_t> state;  // 0 none, 1 being written, 2 written
    FaultKind kind;
    int32_t rank, peer;
    uint64_t sequence, call, peer_call;
  };
  struct RankArea {
    Flag arrived;
    Flag summed;
    alignas(64) std::atomic<uint64_t> calls[2];  // the packed Call of the step's parity, written before arrived
    std::atomic<int32_t> core;  // where the rank last arrived: no use spinning for a peer that needs this very core
    std::atomic<uint32_t> closed;
  };
  struct Header {
    alignas(64) Fault fault;
    RankArea ranks[kMaxWorld];
  };

  static constexpr size_t kHeaderBytes = (sizeof(Header) + 4095) / 4096 * 4096;

  // A step, and the call that it belongs to, for errors.
  struct Moment {
    uint64_t step, sequence, call;
  };

  void await_arrival(int peer, const Moment& moment);
  void catch_up();
  void await(Flag& flag, int peer, const Moment& moment);
  void await_slowly(Flag& flag, int peer, const Moment& moment);
  [[noreturn]] void give_up(FaultKind kind, int peer, const Moment& moment);
  [[noreturn]] void refuse() const;

  const std::string group_name_;
  const int rank_;
  const int world_;
  double timeout_seconds_;  // of a wait; with what follows written under the lock
  const char* timeout_name_ = "SGLCOMM_TIMEOUT";
  std::chrono::steady_clock::time_point waits_end_at_ = std::chrono::steady_clock::time_point::max();
  int spin_limit_ = 0;
  GroupSegment segment_;
  Header* header_ = nullptr;
  std::byte* slots_ = nullptr;
  std::byte* sums_ = nullptr;
  TensorSegments tensor_segments_;
  std::mutex mutex_;
  uint64_t step_;
  std::optional<Moment> behind_;       // the step before this one, of which not every arrival has been seen
  std::atomic<uint64_t> sequence_{0};  // written under the lock
  Ledger ledger_;
  bool ledger_shared_ = false;
  const char* op_ = "";
  Call call_{};
};

}  // namespace sgl_comm
