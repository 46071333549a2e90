// Host memory in which a rank lays a tensor as a whole for its peers, who read it where it lies. Anonymous, as the
// group's segment; made when first needed, kept for the next tensor, and made anew for a larger one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "group_segment.h"

namespace sgl_comm {

class Rooms {
 public:
  explicit Rooms(int world) : rooms_(world) {}

  // Rank's own, of so many bytes at least, which no peer reads any more. How the peers find it; without a descriptor if
  // this host has no memory or no descriptor to give.
  const SegmentHandle& make(int rank, size_t bytes) {
    Room& room = rooms_[rank];
    if (room.handle.descriptor < 0 || room.handle.bytes < bytes) {
      room.memory = std::make_unique<GroupSegment>();
      room.handle = room.memory->publish(0, 1, bytes);
    }
    return room.handle;
  }

  // Finds a peer's. Empty, or why it cannot be reached.
  std::string find(int rank, const SegmentHandle& handle) {
    Room& room = rooms_[rank];
    if (std::equal(handle.nonce, handle.nonce + 2, room.handle.nonce)) return "";
    room = {std::make_unique<GroupSegment>(), {}};
    const std::string reason = room.memory->open(handle);
    room.memory->settle();
    if (reason.empty()) room.handle = handle;
    return reason;
  }

  // Of a rank whose room has been made or found.
  std::byte* data(int rank) const { return rooms_[rank].memory->data(); }

 private:
  struct Room {
    std::unique_ptr<GroupSegment> memory;
    SegmentHandle handle;
  };

  std::vector<Room> rooms_;  // a rank's
};

}  // namespace sgl_comm
