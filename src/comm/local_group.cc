#include "comm/local_group.h"

#include <pthread.h>

#include <array>
#include <cstring>

namespace fusco::comm {

namespace {

struct Groups {
  std::mutex mutex;
  std::map<std::array<std::uint8_t, 32>, std::weak_ptr<LocalGroup>> byKey;
};

Groups& groups() {
  static Groups* const instance = [] {
    static Groups* made = new Groups;
    // A child shares no communicator with its parent.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); },
                   [] {
                     made->byKey.clear();
                     made->mutex.unlock();
                   });
    return made;
  }();
  return *instance;
}

}  // namespace

std::shared_ptr<LocalGroup> LocalGroup::of(const std::uint8_t key[32]) {
  std::array<std::uint8_t, 32> wanted;
  std::memcpy(wanted.data(), key, wanted.size());
  Groups& all = groups();
  std::lock_guard lock(all.mutex);
  std::erase_if(all.byKey, [](const auto& entry) { return entry.second.expired(); });
  std::weak_ptr<LocalGroup>& place = all.byKey[wanted];
  std::shared_ptr<LocalGroup> group = place.lock();
  if (!group) {
    group = std::make_shared<LocalGroup>();
    place = group;
  }
  return group;
}

void LocalGroup::add(std::uint64_t token, LocalMember member) {
  std::lock_guard lock(mutex_);
  members_[token] = std::move(member);
}

LocalMember LocalGroup::find(std::uint64_t token) {
  std::lock_guard lock(mutex_);
  auto found = members_.find(token);
  return found == members_.end() ? LocalMember{} : found->second;
}

}  // namespace fusco::comm
