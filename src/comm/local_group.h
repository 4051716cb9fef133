// Ranks of one communicator that are threads of one process find each other here: pointers instead of descriptors.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "transport/local/rank_memory.h"
#include "transport/local/ring.h"

namespace fusco::comm {

// Rings that other ranks have made for this one, by sender and channel.
struct Inbox {
  std::mutex mutex;
  std::map<std::pair<int, int>, std::shared_ptr<transport::RingMemory>> rings;
};

struct LocalMember {
  std::shared_ptr<transport::RankMemory> memory;
  std::shared_ptr<Inbox> inbox;
};

// Lives as long as one of its ranks holds it.
class LocalGroup {
 public:
  // The group of this process for a communicator's key.
  static std::shared_ptr<LocalGroup> of(const std::uint8_t key[32]);

  // `token` names one attempt to connect; two that call themselves the same rank stay apart.
  void add(std::uint64_t token, LocalMember member);
  // Memory is null if there is none.
  LocalMember find(std::uint64_t token);

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, LocalMember> members_;
};

}  // namespace fusco::comm
