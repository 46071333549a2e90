#include "cpu/shm_communicator.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <sstream>
#include <utility>

#include "check.h"
#include "tensor.h"

namespace sgl_comm {

namespace {

constexpr int64_t kSleepNanoseconds = 20'000'000;
constexpr int kYields = 32;

// Spinning pays while every rank can have a core of its own; else it keeps the core from the rank that is awaited.
constexpr int kSpins = 4000, kSpinsOnTooFewCores = 50;

std::string describe(uint64_t packed) {
  const Call call = Call::unpacked(packed);
  const std::string source = call.has_source() ? " from rank " + std::to_string(call.source) : "";
  return std::string(name_of(call.op)) + " of " + std::to_string(call.count) + " " + name_of(call.dtype) + source;
}

}  // namespace

ShmCommunicator::ShmCommunicator(std::string group_name, int rank, int world, double timeout_seconds,
                                 uint64_t first_epoch)
    : group_name_(std::move(group_name)),
      rank_(rank),
      world_(world),
      timeout_seconds_(timeout_seconds),
      tensor_segments_(world),
      step_(first_epoch) {}

ShmCommunicator::~ShmCommunicator() {
  if (header_ == nullptr) return;
  RankArea& own = header_->ranks[rank_];
  own.closed.store(1, std::memory_order_release);
  own.arrived.wake();
  own.summed.wake();
}

ShmHandle ShmCommunicator::publish() {
  return {segment_.publish(rank_, world_, kHeaderBytes + (2 * world_ + 2) * kSlotBytes), step_};
}

std::string ShmCommunicator::attach(const std::vector<ShmHandle>& handles) {
  std::vector<SegmentHandle> segments;
  for (const ShmHandle& handle : handles) segments.push_back(handle.segment);
  std::string reason = segment_.attach(rank_, segments);
  if (!reason.empty()) return reason;
  for (const ShmHandle& handle : handles) {
    if (handle.first_epoch != step_) return "the ranks have different values of SGLCOMM_FIRST_EPOCH";
  }
  header_ = reinterpret_cast<Header*>(segment_.data());
  header_->ranks[rank_].arrived.start_at(step_);  // no peer looks before all have agreed that all have attached
  header_->ranks[rank_].summed.start_at(step_);
  slots_ = segment_.data() + kHeaderBytes;
  sums_ = slots_ + 2 * world_ * kSlotBytes;
  spin_limit_ = segment_.num_cores() >= world_ ? kSpins : kSpinsOnTooFewCores;
  return "";
}

void ShmCommunicator::limit_waits(double seconds, const char* name) {
  using Clock = std::chrono::steady_clock;
  const std::unique_lock lock(mutex_);
  timeout_seconds_ = seconds;
  timeout_name_ = name;
  const std::chrono::duration<double> span(std::min(seconds, 1e9));
  waits_end_at_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(span);
}

std::unique_lock<std::mutex> ShmCommunicator::begin(const char* op, Call call) {
  std::unique_lock lock(mutex_);
  op_ = op;
  if (__builtin_expect(header_->fault.state.load(std::memory_order_acquire) != 0, 0)) refuse();
  SGL_CHECK(call.count < uint64_t{1} << Call::kCountBits, op, ": got ", call.count, " elements; expected fewer than 2^",
            Call::kCountBits);
  call.refused = ledger_.num_refusals() & ((1u << Call::kRefusedBits) - 1);
  if (call.is_cfg()) call.cuda_calls = ledger_.num_cuda_calls() & ((1u << Call::kCudaCallsBits) - 1);
  call_ = call;
  ++sequence_;
  return lock;
}

void ShmCommunicator::count_refusal() {
  const std::unique_lock lock(mutex_);
  ledger_.count_refusal();
  ++sequence_;
}

void ShmCommunicator::arrive() {
  RankArea& own = header_->ranks[rank_];
  own.calls[step_ & 1].store(call_.packed(), std::memory_order_relaxed);
  own.core.store(sched_getcpu(), std::memory_order_relaxed);
  own.arrived.raise(step_);
}

void ShmCommunicator::await_arrival(int peer) { await_arrival(peer, {step_, sequence_, call_.packed()}); }

// The peer's call can still be read, also where the step is the one before: the peer makes no further step until it has
// seen this rank arrive.
void ShmCommunicator::await_arrival(int peer, const Moment& moment) {
  await(header_->ranks[peer].arrived, peer, moment);
  const uint64_t found = header_->ranks[peer].calls[moment.step & 1].load(std::memory_order_relaxed);
  if (found != moment.call) give_up(FaultKind::kMismatch, peer, moment);
}

void ShmCommunicator::await_later() { behind_ = Moment{step_, sequence_, call_.packed()}; }

void ShmCommunicator::catch_up() {
  for (int peer = 0; peer < world_; ++peer) {
    if (peer != rank_) await_arrival(peer, *behind_);
  }
  behind_.reset();
}

void ShmCommunicator::await_arrivals() {
  for (int peer = 0; peer < world_; ++peer) {
    if (peer != rank_) await_arrival(peer);
  }
}

void ShmCommunicator::announce_sum() { header_->ranks[rank_].summed.raise(step_); }

void ShmCommunicator::await_sum(int rank) {
  await(header_->ranks[rank].summed, rank, {step_, sequence_, call_.packed()});
}

void ShmCommunicator::await(Flag& flag, int peer, const Moment& moment) {
  for (int spin = 0; spin < spin_limit_; ++spin) {
    if (flag.reached(moment.step)) return;
    spin_pause();
    if (spin % 64 == 63 && header_->ranks[peer].core.load(std::memory_order_relaxed) == sched_getcpu()) break;
  }
  await_slowly(flag, peer, moment);
}

__attribute__((noinline)) void ShmCommunicator::await_slowly(Flag& flag, int peer, const Moment& moment) {
  using Clock = std::chrono::steady_clock;
  for (int yield = 0; yield < kYields; ++yield) {
    if (flag.reached(moment.step)) return;
    sched_yield();
  }
  const Clock::time_point start = Clock::now();
  for (;;) {
    // What is seen of the peer's end is older than the second look at its flag: a rank may finish, close and leave.
    const bool closed = header_->ranks[peer].closed.load(std::memory_order_acquire) != 0;
    const bool died = !closed && !segment_.peers().alive(peer);
    if (flag.reached(moment.step)) return;
    if (header_->fault.state.load(std::memory_order_acquire) != 0) refuse();
    if (closed) give_up(FaultKind::kClosed, peer, moment);
    if (died) give_up(FaultKind::kDied, peer, moment);
    const Clock::time_point now = Clock::now();
    const auto seconds = [](Clock::duration span) { return std::chrono::duration<double>(span).count(); };
    const double left = std::min(timeout_seconds_ - seconds(now - start), seconds(waits_end_at_ - now));
    if (left <= 0) give_up(FaultKind::kTimeout, peer, moment);
    flag.sleep_below(moment.step, std::min<int64_t>(kSleepNanoseconds, static_cast<int64_t>(left * 1e9) + 1));
  }
}

void ShmCommunicator::give_up(FaultKind kind, int peer, const Moment& moment) {
  Fault& fault = header_->fault;
  uint32_t none = 0;
  if (fault.state.compare_exchange_strong(none, 1)) {  // the first fault is the one that all ranks report
    fault.kind = kind;
    fault.rank = rank_;
    fault.peer = peer;
    fault.sequence = moment.sequence;
    fault.call = moment.call;
    fault.peer_call = header_->ranks[peer].calls[moment.step & 1].load(std::memory_order_relaxed);
    fault.state.store(2, std::memory_order_release);
    for (RankArea& area : header_->ranks) {
      area.arrived.wake();
      area.summed.wake();
    }
  }
  refuse();
}

void ShmCommunicator::refuse() const {
  for (int look = 0; look < 1000 && header_->fault.state.load(std::memory_order_acquire) == 1; ++look) sched_yield();
  ledger_.set_cpu_failed();
  fail("sgl_comm::", op_, ": rank ", rank_, " of group '", group_name_, "': ", fault());
}

std::string ShmCommunicator::fault() const {
  if (header_ == nullptr || header_->fault.state.load(std::memory_order_acquire) == 0) return "";
  const Fault& fault = header_->fault;
  std::ostringstream text;
  const std::string peer = "rank " + std::to_string(fault.peer), finder = "rank " + std::to_string(fault.rank);
  switch (fault.kind) {
    case FaultKind::kTimeout:
      text << finder << " waited " << timeout_seconds_ << " s (" << timeout_name_ << ") for " << peer
           << ", which never came to";
      break;
    case FaultKind::kDied:
      text << peer << " died; " << finder << " was waiting for it in";
      break;
    case FaultKind::kClosed:
      text << peer << " has closed its communicator; " << finder << " was waiting for it in";
      break;
    case FaultKind::kMismatch: {
      const Call own = Call::unpacked(fault.call), other = Call::unpacked(fault.peer_call);
      const auto one = [&](bool finder_is) { return finder_is ? finder : peer; };
      if (const int more = Call::ahead(own.refused, other.refused, Call::kRefusedBits); more != 0) {
        text << one(more > 0) << " has refused a call that " << one(more < 0) << " made, before";
      } else if (own.is_cfg() && other.is_cfg() && own.cuda_calls != other.cuda_calls) {
        const bool more_here = Call::ahead(own.cuda_calls, other.cuda_calls, Call::kCudaCallsBits) > 0;
        text << one(more_here) << " has made a cfg_ call of CUDA tensors that " << one(!more_here)
             << " has not, before";
      } else {
        text << finder << " called " << describe(fault.call) << " where " << peer << " called "
             << describe(fault.peer_call) << ", in";
      }
      break;
    }
  }
  text << " call " << fault.sequence << " (" << describe(fault.call)
       << "). The communicator is unusable on every rank: close() it and init() again";
  return text.str();
}

}  // namespace sgl_comm
