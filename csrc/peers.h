// Which of the peers' processes are still alive. Header-only, since both libraries ask.
#pragma once

#include <poll.h>
#include <signal.h>
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

  bool alive(int rank) const {
    const Process& process = processes_[rank];
    if (process.pid == 0) return true;
    if (process.fd < 0) return alive_by_pid(process.pid);
    pollfd exited{process.fd, POLLIN, 0};
    return poll(&exited, 1, 0) <= 0;  // a signal, too, is no death
  }

 private:
  struct Process {
    int32_t pid = 0;
    int fd = -1;
  };

  // Without pidfds: a process that is gone, or dead and not yet reaped by its parent, is not alive.
  static bool alive_by_pid(int32_t pid) {
    if (kill(pid, 0) != 0 && errno == ESRCH) return false;
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", pid);
    FILE* file = fopen(path, "r");
    if (file == nullptr) return errno != ENOENT;
    const size_t length = fread(text, 1, sizeof text - 1, file);
    fclose(file);
    text[length] = '\0';
    const char* name_end = strrchr(text, ')');  // the state is the first field after the name
    return name_end == nullptr || name_end[1] == '\0' || (name_end[2] != 'Z' && name_end[2] != 'X');
  }

  std::vector<Process> processes_;
};

}  // namespace sgl_comm
