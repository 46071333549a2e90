#include "cpu/shm.h"

#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

namespace sgl_comm {

namespace {
std::string why(const std::string& what) { return what + ": " + strerror(errno); }
}  // namespace

SharedMemory::~SharedMemory() {
  if (data_ != nullptr) munmap(data_, bytes_);
  close_descriptor();
}

std::string SharedMemory::create(size_t bytes) {
  descriptor_ = memfd_create("sgl_comm", MFD_CLOEXEC);
  if (descriptor_ < 0) return why("memfd_create");
  if (ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) return why("ftruncate of a memfd");
  return map(bytes);
}

std::string SharedMemory::open(int32_t pid, int32_t fd, size_t bytes) {
  const std::string path = "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(fd);
  descriptor_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (descriptor_ < 0) return why("open of " + path);
  struct stat status{};
  if (fstat(descriptor_, &status) != 0) return why("fstat of " + path);
  if (static_cast<size_t>(status.st_size) != bytes) return path + " is not the segment of this group";
  return map(bytes);
}

void SharedMemory::close_descriptor() {
  if (descriptor_ >= 0) ::close(descriptor_);
  descriptor_ = -1;
}

std::string SharedMemory::map(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_, 0);
  if (data == MAP_FAILED) return why("mmap of " + std::to_string(bytes) + " bytes");
  data_ = data;
  bytes_ = bytes;
  return "";
}

}  // namespace sgl_comm
