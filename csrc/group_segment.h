// A piece of host memory shared by a group's processes, and who they are. Anonymous (memfd), so nothing is left behind
// whoever dies when. Header-only, since both libraries use it.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "peers.h"

namespace sgl_comm {

// What ranks exchange, as bytes over their own group.
struct SegmentHandle {
  uint64_t magic = 0;
  uint64_t nonce[2] = {};  // rank 0's: proves that a peer has opened the right file
  uint64_t bytes = 0;
  int32_t rank = -1;
  int32_t world = 0;
  int32_t pid = 0;
  int32_t descriptor = -1;  // rank 0's memfd
  cpu_set_t cores{};        // where the rank may run
};

class GroupSegment {
 public:
  GroupSegment() = default;
  GroupSegment(const GroupSegment&) = delete;
  GroupSegment& operator=(const GroupSegment&) = delete;
  ~GroupSegment() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_bytes_);
    settle();
  }

  // First: rank 0 makes `bytes` of zero-filled memory for the group.
  SegmentHandle publish(int rank, int world, size_t bytes) {
    SegmentHandle handle;
    handle.rank = rank;
    handle.world = world;
    handle.pid = getpid();
    handle.bytes = bytes;
    sched_getaffinity(0, sizeof handle.cores, &handle.cores);
    handle.magic = kMagic;
    if (rank == 0 && getrandom(handle.nonce, sizeof handle.nonce, 0) == sizeof handle.nonce) {
      descriptor_ = memfd_create("sgl_comm", MFD_CLOEXEC);
      if (descriptor_ >= 0 && ftruncate(descriptor_, kPreface + bytes) == 0 && map(bytes).empty()) {
        std::copy_n(handle.nonce, 2, static_cast<uint64_t*>(mapped_));
        handle.descriptor = descriptor_;
      }
    }
    return handle;
  }

  // Then, with the handles of all ranks in order: maps rank 0's memory. Empty, or why this rank cannot.
  std::string attach(int rank, const std::vector<SegmentHandle>& handles) {
    std::vector<int32_t> pids;
    for (size_t r = 0; r < handles.size(); ++r) {
      const SegmentHandle& handle = handles[r];
      if (handle.magic != kMagic || handle.bytes != handles[0].bytes) return "the ranks run different versions";
      if (handle.rank != int32_t(r) || handle.world != int32_t(handles.size())) return "the ranks are not in order";
      pids.push_back(handle.pid);
      CPU_OR(&cores_, &cores_, &handle.cores);
    }
    if (handles[0].descriptor < 0) return "rank 0 cannot make shared memory (memfd_create)";
    if (rank != 0) {
      const std::string reason = open(handles[0]);
      if (!reason.empty()) return "rank 0's shared memory cannot be reached, " + reason;
    }
    peers_.open(pids);
    return "";
  }

  // Maps the memory that another process has published. Empty, or why it cannot.
  std::string open(const SegmentHandle& root) {
    const std::string path = "/proc/" + std::to_string(root.pid) + "/fd/" + std::to_string(root.descriptor);
    descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (descriptor_ < 0) return why(path);
    struct stat status {};
    if (fstat(descriptor_, &status) != 0 || size_t(status.st_size) != kPreface + root.bytes) {
      return path + " is another file: another host or container?";
    }
    const std::string reason = map(root.bytes);
    if (!reason.empty()) return reason;
    if (!std::equal(root.nonce, root.nonce + 2, static_cast<uint64_t*>(mapped_))) {
      return path + " is another file: another host or container?";
    }
    return "";
  }

  // At last, when all ranks have attached or given up: nobody opens the memory again.
  void settle() {
    if (descriptor_ >= 0) close(descriptor_);
    descriptor_ = -1;
  }

  bool attached() const { return peers_.count() > 0; }
  std::byte* data() const { return static_cast<std::byte*>(mapped_) + kPreface; }
  const PeerProcesses& peers() const { return peers_; }
  // How many cores the ranks may use, all together.
  int num_cores() const { return CPU_COUNT(&cores_); }

 private:
  static constexpr uint64_t kMagic = 0x314d4d4f434c4753;  // "SGLCOMM1"
  static constexpr size_t kPreface = 4096;                // the nonce, on a page of its own

  std::string map(size_t bytes) {
    constexpr int kFlags = MAP_SHARED | MAP_POPULATE;
    void* memory = mmap(nullptr, kPreface + bytes, PROT_READ | PROT_WRITE, kFlags, descriptor_, 0);
    if (memory == MAP_FAILED) return why("mmap");
    mapped_ = memory;
    mapped_bytes_ = kPreface + bytes;
    return "";
  }

  static std::string why(const std::string& what) { return what + ": " + strerror(errno); }

  void* mapped_ = nullptr;
  size_t mapped_bytes_ = 0;
  int descriptor_ = -1;
  PeerProcesses peers_;
  cpu_set_t cores_{};
};

}  // namespace sgl_comm
