// Group name -> what serves it. One registry a library (the CPU's and CUDA's are apart). A name is known from open() to
// close(), serves calls from settle() on, and is remembered when closed so that the error can say so.
#pragma once

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "check.h"

namespace sgl_comm {

// Counts forks: 0 in the process that loaded the library, one more in each forked child.
inline std::atomic<int>& fork_depth() {
  static std::atomic<int> depth{0};
  return depth;
}

// A group of ranks and the communicator that serves it; a null communicator means the fallback does.
template <typename Communicator>
struct Group {
  std::string name;
  int rank = 0;
  int world = 1;
  int fork_depth = 0;
  std::string backend;  // the group's own, which the fallback uses: "gloo", "nccl", ...
  std::unique_ptr<Communicator> communicator;
  std::string reason;                   // why there is none
  bool compare_calls = false;           // what the ranks are about to call, before they do (SGLCOMM_CHECK)
  std::atomic<bool> settled{false};     // the communicator stays as it is from here on
  std::atomic<double> waits_end_at{0};  // of a group that the grafter made: seconds of steady_clock
};

template <typename Communicator>
class Registry {
 public:
  using GroupPtr = std::shared_ptr<Group<Communicator>>;

  // The library's one registry. Never destroyed: threads may still call at exit. Its lock is never held over a fork.
  static Registry& instance() {
    static Registry* const registry = [] {
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] {
                       new (&instance().mutex_) std::shared_mutex;  // the child's thread is not the one that locked it
                       ++sgl_comm::fork_depth();
                     });
      return new Registry;
    }();
    return *registry;
  }

  // A name of the parent's may be opened anew in a forked child.
  void open(const std::string& name, int rank, int world, const std::string& backend = "", bool compare_calls = false) {
    auto group = std::make_shared<Group<Communicator>>();
    group->name = name;
    group->rank = rank;
    group->world = world;
    group->backend = backend;
    group->compare_calls = compare_calls;
    group->fork_depth = fork_depth().load();
    std::unique_lock lock(mutex_);
    GroupPtr& place = groups_[name];
    SGL_CHECK(place == nullptr || place->fork_depth != group->fork_depth, "init: group '", name,
              "' already has a communicator; close() it first");
    if (place != nullptr) inherited_.push_back(std::move(place));
    place = std::move(group);
    closed_.erase(name);
  }

  // Takes the group out. Null where the name is unknown, or belongs to the parent of a forked child.
  GroupPtr close(const std::string& name) {
    std::unique_lock lock(mutex_);
    const auto place = groups_.find(name);
    if (place == groups_.end() || place->second->fork_depth != fork_depth().load()) return nullptr;
    GroupPtr group = std::move(place->second);
    groups_.erase(place);
    closed_.insert(name);
    return group;
  }

  // The end of set-up: all ranks have agreed on whether the communicator serves, or on why it does not.
  void settle(const std::string& name, bool agreed, const std::string& reason = "") {
    const GroupPtr group = find_open("init", name);
    group->reason = reason;
    if (agreed) {
      group->communicator->settle();
    } else {
      group->communicator.reset();
    }
    group->settled.store(true, std::memory_order_release);
  }

  // Why the group's communicator has become unusable; empty while it is not.
  std::string fault(const std::string& name) const {
    const GroupPtr group = find("check", name);
    return group->communicator ? group->communicator->fault() : "";
  }

  // For calls that may do without: null where there is no such group, or not yet.
  GroupPtr find_if_settled(const std::string& name) const {
    std::shared_lock lock(mutex_);
    const auto place = groups_.find(name);
    if (place == groups_.end() || place->second->fork_depth != fork_depth().load()) return nullptr;
    return place->second->settled.load(std::memory_order_acquire) ? place->second : nullptr;
  }

  // For calls: only a settled group.
  GroupPtr find(const char* op, const std::string& name) const {
    GroupPtr group = find_open(op, name);
    SGL_CHECK(group->settled.load(std::memory_order_acquire), op, ": group '", name, "' is still being initialised");
    return group;
  }

  // For set-up: settled or not.
  GroupPtr find_open(const char* op, const std::string& name) const {
    std::shared_lock lock(mutex_);
    const auto place = groups_.find(name);
    if (__builtin_expect(place == groups_.end(), 0)) refuse(op, name);
    SGL_CHECK(place->second->fork_depth == fork_depth().load(), op, ": group '", name,
              "' was made by the parent of this forked process; init() a group of the child's own");
    return place->second;
  }

 private:
  [[noreturn]] void refuse(const char* op, const std::string& name) const {
    SGL_CHECK(!closed_.count(name), op, ": the communicator of group '", name, "' is closed; init() it again");
    std::string known;
    for (const auto& entry : groups_) known += (known.empty() ? "'" : ", '") + entry.first + "'";
    fail("sgl_comm::", op, ": unknown group '", name,
         "'; call sgl_comm.init(group) first (known: ", known.empty() ? "none" : known, ")");
  }

  mutable std::shared_mutex mutex_;
  std::unordered_map<std::string, GroupPtr> groups_;
  std::unordered_set<std::string> closed_;
  std::vector<GroupPtr> inherited_;  // of a forked child's parent: never destroyed here
};

}  // namespace sgl_comm
