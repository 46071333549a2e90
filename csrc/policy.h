// Which algorithm for this message: pure functions of numbers that all ranks share.
#pragma once

#include <cstdint>
#include <string>

#include "check.h"

namespace sgl_comm {

enum class Algorithm { kOneShot, kRing };

// slot_bytes: the most that one launch can push to a peer at once.
inline Algorithm choose(int64_t bytes, int64_t slot_bytes) {
  return bytes <= slot_bytes ? Algorithm::kOneShot : Algorithm::kRing;
}

// `wish` is "auto" or an algorithm's name, which must suit the message.
inline Algorithm choose(const char* op, const std::string& wish, int64_t bytes, int64_t slot_bytes) {
  if (wish == "auto") return choose(bytes, slot_bytes);
  if (wish == "ring") return Algorithm::kRing;
  SGL_CHECK(wish == "one_shot", op, ": got algo '", wish, "'; expected auto, one_shot or ring");
  SGL_CHECK(bytes <= slot_bytes, op, ": got algo 'one_shot' for ", bytes,
            " bytes; expected at most max_size = ", slot_bytes, " bytes");
  return Algorithm::kOneShot;
}

}  // namespace sgl_comm
