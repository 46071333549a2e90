// Group name -> group. One registry a library: the CPU's and CUDA's are apart. A group in the registry never changes:
// set-up puts a changed copy in its place, so that a call goes on with what it has found, and that lives until the call
// ends.
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

// What both libraries know of a group of ranks. Each adds the communicators that it has for it.
struct GroupRecord {
  std::string name;
  int rank = 0;
  int world = 1;
  bool compare_calls = false;  // whether ranks compare what they are about to call (SGLCOMM_CHECK)
  int fork_depth = 0;
};

// A communicator in a group: held from open to close, and serving calls from settle on.
template <typename Communicator>
struct Part {
  bool open = false;
  bool settled = false;                        // set-up is over: the communicator stays as it is
  std::shared_ptr<Communicator> communicator;  // null where it does not serve
  std::string reason;                          // why it does not

  Communicator* serving() const { return settled ? communicator.get() : nullptr; }

  // The end of set-up: all ranks have agreed on whether the communicator serves, or on why it does not.
  void settle(bool agreed, const std::string& why_not = "") {
    if (!agreed) communicator.reset();
    reason = why_not;
    settled = true;
  }
};

// Group is a GroupRecord with settled(), whether calls may be made, and in_use(), whether anything is open in it.
template <typename Group>
class Registry {
 public:
  using GroupPtr = std::shared_ptr<const Group>;

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

  // Opens a part of a group, which is new or has other parts open: open_part(Group&) marks it, or throws where it is
  // open already. A forked child may open a name of its parent's anew.
  template <typename OpenPart>
  void open(GroupRecord record, OpenPart&& open_part) {
    record.fork_depth = fork_depth().load();
    std::unique_lock lock(mutex_);
    const auto entry = groups_.find(record.name);
    const bool known = entry != groups_.end() && entry->second->fork_depth == record.fork_depth;
    auto group = known ? std::make_shared<Group>(*entry->second) : std::make_shared<Group>();
    if (!known) static_cast<GroupRecord&>(*group) = record;
    open_part(*group);
    if (!known && entry != groups_.end()) inherited_.push_back(entry->second);
    groups_[record.name] = std::move(group);
    closed_.erase(record.name);
  }

  // Puts a copy of the group, changed by change(Group&), in its place. Does nothing where the name is unknown, or
  // belongs to the parent of a forked child. A group that is no longer in use leaves the registry, which remembers its
  // name so that errors can say so. What the change has dropped is destroyed when the last call that uses it ends.
  template <typename Change>
  void change(const std::string& name, Change&& change) {
    GroupPtr before;  // destroyed without the lock
    std::unique_lock lock(mutex_);
    const auto entry = groups_.find(name);
    if (entry == groups_.end() || entry->second->fork_depth != fork_depth().load()) return;
    auto group = std::make_shared<Group>(*entry->second);
    change(*group);
    before = std::exchange(entry->second, std::move(group));
    if (!entry->second->in_use()) {
      groups_.erase(entry);
      closed_.insert(name);
    }
  }

  // For calls that may do without: null where there is no such group, or not yet.
  GroupPtr find_if_settled(const std::string& name) const {
    std::shared_lock lock(mutex_);
    const auto entry = groups_.find(name);
    if (entry == groups_.end() || entry->second->fork_depth != fork_depth().load()) return nullptr;
    return entry->second->settled() ? entry->second : nullptr;
  }

  // For calls: only a settled group.
  GroupPtr find(const char* op, const std::string& name) const {
    GroupPtr group = find_open(op, name);
    SGL_CHECK(group->settled(), op, ": group '", name, "' is still being initialised");
    return group;
  }

  // For set-up: settled or not.
  GroupPtr find_open(const char* op, const std::string& name) const {
    std::shared_lock lock(mutex_);
    const auto entry = groups_.find(name);
    if (__builtin_expect(entry == groups_.end(), 0)) refuse(op, name);
    SGL_CHECK(entry->second->fork_depth == fork_depth().load(), op, ": group '", name,
              "' was made by the parent of this forked process; init() a group of the child's own");
    return entry->second;
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
