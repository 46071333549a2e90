#include <algorithm>
#include <chrono>
#include <cstring>
#include <sstream>
#include <utility>

#include "cuda/communicator_v2.h"
#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

namespace {

constexpr std::chrono::milliseconds kWatchInterval{100};
constexpr std::chrono::milliseconds kPatienceAtClose{1000};

bool same_device(const cudaUUID_t& a, const cudaUUID_t& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

}  // namespace

std::mutex CommunicatorV2::retired_mutex_;
std::vector<CommunicatorV2::Retired> CommunicatorV2::retired_;

CommunicatorV2::CommunicatorV2(std::string group_name, int rank, int world, int device, int64_t slot_bytes,
                               double timeout_seconds, Residency residency)
    : group_name_(std::move(group_name)),
      rank_(rank),
      world_(world),
      device_(device),
      slot_bytes_(slot_bytes),
      timeout_seconds_(timeout_seconds),
      residency_(residency) {
  SGL_CHECK(slot_bytes >= kMinSlotBytes && slot_bytes % 16 == 0, "init: got max_size ", slot_bytes,
            "; expected a multiple of 16 bytes, at least ", kMinSlotBytes);
}

CommunicatorV2::~CommunicatorV2() {
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
    retired_.push_back({std::move(workspace_), segment_, world_, told_});
  }
  free_retired(peers_elsewhere_);
  if (fault_ != nullptr) cudaFreeHost(fault_);
  cudaSetDevice(previous);
}

bool CommunicatorV2::Retired::may_be_freed() const {
  if (!segment->attached()) return !told;  // a peer may have opened it, and could not tell
  const PeerState* states = reinterpret_cast<const PeerState*>(segment->data());
  for (int r = 0; r < world; ++r) {
    if (states[r].unmapped.load(std::memory_order_acquire) == 0 && !segment->peers().gone(r)) return false;
  }
  return true;
}

// Frees what no peer has open any more. What a peer still has open stays for the next call.
void CommunicatorV2::free_retired(bool wait) {
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

HandleV2 CommunicatorV2::publish() {
  free_retired(false);
  HandleV2 handle{};
  handle.slot_bytes = slot_bytes_;
  handle.residency = residency_;
  handle.segment = segment_->publish(rank_, world_, world_ * sizeof(PeerState));
  const DeviceScope scope(device_);
  cudaDeviceProp properties{};
  SGL_CUDA_CHECK("init", cudaGetDeviceProperties(&properties, device_));
  handle.device = properties.uuid;
  handle.compute_capability = properties.major * 10 + properties.minor;
  void* pinned = nullptr;
  SGL_CUDA_CHECK("init", cudaHostAlloc(&pinned, 4096, cudaHostAllocMapped | cudaHostAllocPortable));
  std::memset(pinned, 0, 4096);
  fault_ = static_cast<device::Fault*>(pinned);
  host_abort_ = reinterpret_cast<device::HostAbort*>(static_cast<std::byte*>(pinned) + 256);
  workspace_ = std::make_unique<Workspace>(world_, slot_bytes_);
  handle.workspace = workspace_->handle();
  return handle;
}

std::string CommunicatorV2::attach(const std::vector<HandleV2>& handles) {
  told_ = true;
  std::vector<SegmentHandle> segments;
  for (const HandleV2& handle : handles) {
    if (handle.failure[0] != 0) return "rank " + std::to_string(segments.size()) + ": " + handle.failure;
    if (handle.slot_bytes != slot_bytes_) return "the ranks were given different max_size";
    segments.push_back(handle.segment);
  }
  std::string reason = segment_->attach(rank_, segments);
  if (!reason.empty()) return reason;
  const DeviceScope scope(device_);
  limits_ = residency_;
  int most_on_a_device = 1;
  for (int r = 0; r < world_; ++r) {
    const HandleV2& peer = handles[r];
    for (int kind = 0; kind < Residency::kKinds; ++kind) {
      limits_.blocks[kind] = std::min(limits_.blocks[kind], peer.residency.blocks[kind]);
    }
    const auto shares = [&](const HandleV2& other) { return same_device(peer.device, other.device); };
    most_on_a_device = std::max<int>(most_on_a_device, std::count_if(handles.begin(), handles.end(), shares));
    try {
      if (r == rank_) {
        view_.workspace[r] = workspace_->data();
      } else {
        const bool same_process = peer.segment.pid == segments[rank_].pid;
        peers_elsewhere_ |= !same_process;
        peers_.emplace_back(peer.workspace, same_process);
        view_.workspace[r] = peers_.back().data();
      }
    } catch (const std::exception& error) {
      cudaGetLastError();
      return "no peer access to the GPU of rank " + std::to_string(r) + " (" + error.what() + ")";
    }
  }
  for (int& blocks : limits_.blocks) blocks = std::max(1, blocks / (2 * most_on_a_device));
  void* mapped = nullptr;
  SGL_CUDA_CHECK("init", cudaHostGetDevicePointer(&mapped, fault_, 0));
  view_.fault = static_cast<device::Fault*>(mapped);
  view_.host_abort = reinterpret_cast<const device::HostAbort*>(static_cast<std::byte*>(mapped) + 256);
  view_.slot_bytes = slot_bytes_;
  view_.timeout_ticks = static_cast<uint32_t>(std::clamp(timeout_seconds_ * 1e9 / (1 << 20), 1.0, 2e9));
  view_.rank = rank_;
  return "";
}

void CommunicatorV2::settle() {
  segment_->settle();
  watcher_ = std::thread([this] { watch(); });
}

// Tells the kernels when a peer's process has died. Makes no CUDA call.
void CommunicatorV2::watch() {
  std::unique_lock lock(watcher_mutex_);
  while (!watcher_wake_.wait_for(lock, kWatchInterval, [this] { return closing_; })) {
    for (int r = 0; r < world_; ++r) {
      if (segment_->peers().alive(r) || peer_states()[r].unmapped.load(std::memory_order_acquire) != 0) continue;
      const device::AbortCode code{static_cast<uint32_t>(rank_), static_cast<uint32_t>(r), 1};
      reinterpret_cast<std::atomic<uint32_t>*>(&host_abort_->abort)->store(code.packed(), std::memory_order_release);
      return;
    }
  }
}

std::string CommunicatorV2::fault() const {
  if (!failed()) return "";
  const bool seen_by_kernel = static_cast<const volatile device::Fault*>(fault_)->written != 0;
  const device::Fault fault = *fault_;
  const device::AbortCode code = device::AbortCode::unpacked(seen_by_kernel ? fault.abort : host_abort_->abort);
  std::ostringstream text;
  if (code.died) {
    text << "rank " << code.peer << " died, as rank " << code.rank << " saw";
  } else {
    text << "rank " << code.rank << " waited " << timeout_seconds_ << " s (SGL_COMM_TIMEOUT) for rank " << code.peer
         << ", which never came";
  }
  if (seen_by_kernel) text << " (call " << fault.epoch + 1 << ", block " << fault.block << ")";
  text << ". Outputs since then are NaN, and the communicator is unusable on every rank: close() it and init() again";
  return text.str();
}

}  // namespace sgl_comm::cuda
