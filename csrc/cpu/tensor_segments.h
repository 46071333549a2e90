// Segments that hold one tensor each, which a rank writes and its peers read without copying it through slots.
// Anonymous, as the group's segment; made when first needed, kept for the next tensor, and made anew for a larger one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "group_segment.h"

namespace sgl_comm {

class TensorSegments {
 public:
  explicit TensorSegments(int world) : ranks_(world) {}

  // This rank's own segment, of at least so many bytes; before, no peer may read it any more. Returns the handle for
  // the peers, without a descriptor if this host has no memory or no descriptor to give.
  const SegmentHandle& make(int rank, size_t bytes) {
    OfRank& own = ranks_[rank];
    if (own.handle.descriptor < 0 || own.handle.bytes < bytes) {
      own.segment = std::make_unique<GroupSegment>();
      own.handle = own.segment->publish(0, 1, bytes);
    }
    return own.handle;
  }

  // Maps a peer's segment. Empty, or why it cannot be reached.
  std::string attach(int rank, const SegmentHandle& handle) {
    OfRank& peer = ranks_[rank];
    if (std::equal(handle.nonce, handle.nonce + 2, peer.handle.nonce)) return "";
    peer = {std::make_unique<GroupSegment>(), {}};
    const std::string reason = peer.segment->open(handle);
    peer.segment->settle();
    if (reason.empty()) peer.handle = handle;
    return reason;
  }

  // The memory of a rank whose segment has been made or attached.
  std::byte* data(int rank) const { return ranks_[rank].segment->data(); }

 private:
  struct OfRank {
    std::unique_ptr<GroupSegment> segment;
    SegmentHandle handle;
  };

  std::vector<OfRank> ranks_;
};

}  // namespace sgl_comm
