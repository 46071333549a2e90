#include "cuda/group/device_group.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <utility>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

namespace {

constexpr std::chrono::milliseconds kWatchInterval{100};
constexpr std::chrono::microseconds kRefusalInterval{50};
constexpr std::chrono::milliseconds kPatienceAtClose{1000};

bool same_device(const cudaUUID_t& a, const cudaUUID_t& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

std::mutex DeviceGroup::retired_mutex_;
std::vector<DeviceGroup::Retired> DeviceGroup::retired_;

DeviceGroup::DeviceGroup(int rank, int world, int device, double timeout_seconds, uint64_t first_epoch)
    : rank_(rank), world_(world), device_(device), timeout_seconds_(timeout_seconds), first_epoch_(first_epoch) {}

DeviceGroup::~DeviceGroup() {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(device_);
  cudaDeviceSynchronize();  // every kernel that touches a workspace ends, by its deadline or at a peer's death
  if (watcher_.joinable()) {
    {
      std::lock_guard lock(watcher_mutex_);
      closing_ = true;
    }
    watcher_wake_.notify_all();
    watcher_.join();
  }
  peers_.clear();
  if (segment_->attached()) peer_states()[rank_].unmapped.store(1, std::memory_order_release);
  {
    std::lock_guard lock(retired_mutex_);
    retired_.push_back({std::move(workspace_), segment_, world_, handle_published_});
  }
  free_retired(peers_elsewhere_);
  if (fault_ != nullptr) cudaFreeHost(fault_);
  cudaSetDevice(previous);
}

bool DeviceGroup::Retired::may_be_freed() const {
  if (!segment->attached()) return !handle_published;  // a peer may have opened it, and this rank would not know
  const PeerState* states = reinterpret_cast<const PeerState*>(segment->data());
  for (int r = 0; r < world; ++r) {
    if (states[r].unmapped.load(std::memory_order_acquire) == 0 && !segment->peers().gone(r)) return false;
  }
  return true;
}

// Frees what no peer has open any more. What a peer still has open stays for the next call.
void DeviceGroup::free_retired(bool wait) {
  const auto deadline = std::chrono::steady_clock::now() + (wait ? kPatienceAtClose : kPatienceAtClose * 0);
  for (;;) {
    {
      std::lock_guard lock(retired_mutex_);
      const auto kept =
          std::remove_if(retired_.begin(), retired_.end(), [](const Retired& r) { return r.may_be_freed(); });
      retired_.erase(kept, retired_.end());
      if (retired_.empty()) return;
    }
    if (std::chrono::steady_clock::now() >= deadline) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

DeviceHandle DeviceGroup::publish(WorkspaceBytes bytes) {
  free_retired(false);
  DeviceHandle handle{};
  handle.segment = segment_->publish(rank_, world_, world_ * sizeof(PeerState));
  handle.first_epoch = first_epoch_;
  const DeviceScope scope(device_);
  cudaDeviceProp properties{};
  SGL_CUDA_CHECK("init", cudaGetDeviceProperties(&properties, device_));
  handle.device = properties.uuid;
  void* pinned = nullptr;
  SGL_CUDA_CHECK("init", cudaHostAlloc(&pinned, 4096, cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(pinned, 0, 4096);
  fault_ = static_cast<device::Fault*>(pinned);
  host_abort_ = reinterpret_cast<device::HostAbort*>(static_cast<std::byte*>(pinned) + 256);
  workspace_ = std::make_unique<Workspace>(bytes, first_epoch_);
  handle.workspace = workspace_->handle();
  handle.workspace_bytes = bytes.all();
  return handle;
}

std::string DeviceGroup::attach(const std::vector<DeviceHandle>& handles) {
  handle_published_ = true;
  std::vector<SegmentHandle> segments;
  for (const DeviceHandle& handle : handles) {
    if (handle.workspace_bytes != handles[0].workspace_bytes) return "the ranks were given different max_size";
    if (handle.first_epoch != handles[0].first_epoch) return "the ranks were given different SGLCOMM_FIRST_EPOCH";
    segments.push_back(handle.segment);
    segment_pids_.push_back(handle.segment.pid);
  }
  const std::string reason = segment_->attach(rank_, segments);
  if (!reason.empty()) return reason;
  const DeviceScope scope(device_);
  for (int r = 0; r < world_; ++r) {
    const DeviceHandle& peer = handles[r];
    const auto shares = [&](const DeviceHandle& other) { return same_device(peer.device, other.device); };
    most_on_a_device_ = std::max<int>(most_on_a_device_, std::count_if(handles.begin(), handles.end(), shares));
    try {
      if (r == rank_) {
        view_.workspace[r] = workspace_->data();
      } else {
        peers_elsewhere_ |= !same_process(r);
        peers_.emplace_back(peer.workspace, same_process(r));
        view_.workspace[r] = peers_.back().data();
      }
    } catch (const std::exception& error) {
      cudaGetLastError();
      return "no peer access to the GPU of rank " + std::to_string(r) + " (" + error.what() + ")";
    }
  }
  void* mapped = nullptr;
  SGL_CUDA_CHECK("init", cudaHostGetDevicePointer(&mapped, fault_, 0));
  view_.fault = static_cast<device::Fault*>(mapped);
  view_.host_abort = reinterpret_cast<const device::HostAbort*>(static_cast<std::byte*>(mapped) + 256);
  view_.timeout_ticks = static_cast<uint32_t>(std::clamp(timeout_seconds_ * 1e9 / (1 << 20), 1.0, 2e9));
  view_.rank = rank_;
  return "";
}

void DeviceGroup::settle() {
  segment_->settle();
  watcher_ = std::thread([this] { watch(); });
}

// Sets the host's abort word, which kernels read, when a peer's process has died. Makes no CUDA call.
void DeviceGroup::watch() {
  std::unique_lock lock(watcher_mutex_);
  while (!watcher_wake_.wait_for(lock, kWatchInterval, [this] { return closing_; })) {
    for (int r = 0; r < world_; ++r) {
      if (segment_->peers().alive(r) || peer_states()[r].unmapped.load(std::memory_order_acquire) != 0) continue;
      fail({static_cast<uint32_t>(rank_), static_cast<uint32_t>(r), device::AbortCode::kDied});
      return;
    }
  }
}

void DeviceGroup::fail(const device::AbortCode& code) {
  reinterpret_cast<std::atomic<uint32_t>*>(&host_abort_->abort)->store(code.packed(), std::memory_order_release);
}

void DeviceGroup::publish_refusals(uint64_t refusals, uint64_t calls) {
  peer_states()[rank_].refusals[refusals % PeerState::kKept].store(Refusal{refusals, calls}.packed(),
                                                                   std::memory_order_release);
}

DeviceGroup::Answer DeviceGroup::answer_of(int peer, const Refusal& own) const {
  const uint64_t published =
      peer_states()[peer].refusals[own.number % PeerState::kKept].load(std::memory_order_acquire);
  const uint64_t number = published >> Refusal::kCallBits;
  if (number < own.number) return Answer::kNotYet;
  return number > own.number || published == own.packed() ? Answer::kRefused : Answer::kAnother;
}

void DeviceGroup::settle_refusals(uint64_t refusals, uint64_t calls) {
  std::lock_guard lock(refusals_mutex_);
  if (settled_refusals() == refusals) return;
  publish_refusals(refusals, calls);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_seconds_);
  for (int r = 0; r < world_; ++r) {
    Answer answer{};
    while (!failed() && (answer = answer_of(r, {refusals, calls})) == Answer::kNotYet) {
      if (std::chrono::steady_clock::now() >= deadline) break;
      std::this_thread::sleep_for(kRefusalInterval);
    }
    if (failed()) return;
    if (answer != Answer::kRefused) {
      return fail({static_cast<uint32_t>(rank_), static_cast<uint32_t>(r), device::AbortCode::kRefused});
    }
  }
  settled_refusals_.store(refusals, std::memory_order_release);
}

std::string DeviceGroup::fault() const {
  if (!failed()) return "";
  const bool seen_by_kernel = static_cast<const volatile device::Fault*>(fault_)->written != 0;
  const device::Fault fault = *fault_;
  const device::AbortCode code = device::AbortCode::unpacked(seen_by_kernel ? fault.abort : host_abort_->abort);
  std::ostringstream text;
  switch (code.kind) {
    case device::AbortCode::kDied:
      text << "rank " << code.peer << " died, as rank " << code.rank << " saw";
      break;
    case device::AbortCode::kOverlap:
      text << "two calls ran at once on rank " << code.rank
           << " (two CUDA graphs, or a graph and an eager call, on two streams); expected one after the other";
      break;
    case device::AbortCode::kRefused:
      text << "rank " << code.rank << " has refused a call that rank " << code.peer << " has not";
      break;
    case device::AbortCode::kUnregistered:
      text << "rank " << code.rank << " replayed a CUDA graph before its inputs were registered; expected capture() to"
           << " have been left without an error on every rank";
      break;
    default:
      text << "rank " << code.rank << " waited " << timeout_seconds_ << " s (SGLCOMM_TIMEOUT) for rank " << code.peer
           << ", which never came";
  }
  if (seen_by_kernel) {
    text << " (" << name_of(static_cast<Op>(fault.op)) << ", call " << fault.epoch - first_epoch_ + 1 << ", block "
         << fault.block << ")";
  }
  text << ". Outputs since then are NaN, and the communicator is unusable on every rank: close() it and init() again";
  return text.str();
}

}  // namespace sgl_comm::cuda
