// An anonymous shared-memory segment: no name, so nothing is left behind whoever dies when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace sgl_comm {

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;
  ~SharedMemory();

  // Makes a zero-filled segment in this process. Empty, or why not.
  std::string create(size_t bytes);
  // Maps the segment that process `pid` holds as its file descriptor `fd`. Empty, or why not. Proving that it is the
  // segment that was meant is the caller's part.
  std::string open(int32_t pid, int32_t fd, size_t bytes);
  // Gives up the descriptor; the mapping stays.
  void close_descriptor();

  void* data() const { return data_; }
  int descriptor() const { return descriptor_; }

 private:
  std::string map(size_t bytes);

  void* data_ = nullptr;
  size_t bytes_ = 0;
  int descriptor_ = -1;
};

}  // namespace sgl_comm
