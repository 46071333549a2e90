// Which of the peers' processes are still alive. Header-only, since both libraries ask.
#pragma once

#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <vector>

namespace sgl_comm {

// Holds a pidfd a peer where the kernel has them, so that a reused process id is never mistaken for the peer.
class PeerProcesses {
 public:
  PeerProcesses() = default;
  PeerProcesses(const PeerProcesses&) = delete;
  PeerProcesses& operator=(const PeerProcesses&) = delete;
  ~PeerProcesses() {
    for (const Process& process : processes_) {
      if (process.fd >= 0) close(process.fd);
    }
  }

  // pids[rank]; a peer inside this process counts as alive always.
  void open(const std::vector<int32_t>& pids) {
    for (const int32_t pid : pids) {
      Process process;
      if (pid != getpid()) {
        process.pid = pid;
#ifdef SYS_pidfd_open
        process.fd = static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
#endif
      }
      processes_.push_back(process);
    }
  }

  int count() const { return static_cast<int>(processes_.size()); }

  // False as soon as the process has begun to exit: with a GPU's driver to release, its end can take seconds.
  bool alive(int rank) const {
    return !gone(rank) && (processes_[rank].pid == 0 || !exiting(processes_[rank].pid, true));
  }

  // The process has ended, and what it had mapped is unmapped.
  bool gone(int rank) const {
    const Process& process = processes_[rank];
    if (process.pid == 0) return false;
    if (process.fd < 0) return exiting(process.pid, false);
    pollfd exited{process.fd, POLLIN, 0};
    return poll(&exited, 1, 0) > 0;  // a signal that interrupts is no death
  }

 private:
  struct Process {
    int32_t pid = 0;
    int fd = -1;
  };

  // Gone; or dead and not yet reaped by its parent; or, if `already`, on its way out by the kernel's flags of the task.
  static bool exiting(int32_t pid, bool already) {
    constexpr unsigned long kExiting = 0x4;  // PF_EXITING
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE* file = fopen(path, "re");
    if (file == nullptr) return errno == ENOENT || errno == ESRCH;
    const size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    const char* name_end = strrchr(text, ')');  // the fields after the name: state, five numbers, the flags
    char state = 0;
    unsigned long flags = 0;
    if (name_end == nullptr || sscanf(name_end + 1, " %c %*d %*d %*d %*d %*d %lu", &state, &flags) != 2) return false;
    return state == 'Z' || state == 'X' || (already && (flags & kExiting) != 0);
  }

  std::vector<Process> processes_;
};

}  // namespace sgl_comm
