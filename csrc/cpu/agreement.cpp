#include "cpu/agreement.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <vector>

#include "fallback.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

constexpr size_t kTextBytes = 1024;  // what is longer is cut
using Bytes = std::vector<char>;

std::string text_of(const char* bytes) { return std::string(bytes, strnlen(bytes, kTextBytes)); }

// Every rank's text, in rank order. It is a step of its own in shared memory.
std::vector<std::string> texts_of_ranks(const char* op, const GroupPtr& group, const std::string& text) {
  Bytes mine(kTextBytes);
  std::copy_n(text.data(), std::min(text.size(), kTextBytes), mine.data());
  std::vector<std::string> texts;
  ShmCommunicator* const comm = group->shm.serving();
  if (comm == nullptr) {
    const Tensor sent = torch::stable::from_blob(mine.data(), {static_cast<int64_t>(kTextBytes)}, {1},
                                                 torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                                 torch::headeronly::ScalarType::Byte);
    const Tensor all = fallback::all_gather(op, sent, group->name, group->world);
    const char* const received = static_cast<const char*>(all.const_data_ptr());
    for (int r = 0; r < group->world; ++r) texts.push_back(text_of(received + r * kTextBytes));
    return texts;
  }
  const auto turn = comm->begin(op, {Op::kCompareCalls, torch::headeronly::ScalarType::Byte, kTextBytes});
  comm->next_step();
  std::memcpy(comm->slot(comm->rank()), mine.data(), kTextBytes);
  comm->arrive();
  comm->await_arrivals();
  for (int r = 0; r < comm->world(); ++r) texts.push_back(text_of(reinterpret_cast<const char*>(comm->slot(r))));
  return texts;
}

}  // namespace

std::string compare_calls(const char* op, const GroupPtr& group, const std::string& text, bool refused) {
  const std::vector<std::string> texts = texts_of_ranks(op, group, (refused ? "refused, " : "") + text);
  const bool alike = std::all_of(texts.begin(), texts.end(), [&](const std::string& t) { return t == texts[0]; });
  if (alike && !refused) return "";
  std::ostringstream reason;
  reason << "sgl_comm::" << op << ": expected the same call on every rank, and none that is refused; got ";
  for (size_t r = 0; r < texts.size(); ++r) reason << (r == 0 ? "" : "; ") << "rank " << r << ": " << texts[r];
  reason << ". Nothing was sent (SGLCOMM_CHECK)";
  return reason.str();
}

namespace {

// compare_calls() as an op, for calls of tensors of other devices.
std::string compare_calls_of(const Text& group_name, const Text& op, const Text& text, bool refused) {
  return compare_calls(op.c_str(), groups().find(op.c_str(), group_name), text, refused);
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_compare_calls", TORCH_BOX(&sgl_comm::cpu::compare_calls_of));
}
