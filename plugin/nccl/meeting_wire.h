// What travels between a rank and the place where the ranks meet: the hello once, then in each round a head with words
// up, and a head with the table down: for each rank a byte, whether it is there, and its words.
#pragma once

#include <sys/un.h>

#include <cstdint>

#include "plugin/nccl/meeting.h"

namespace fusco::nccl::wire {

struct Hello {
  static constexpr std::uint64_t kMagic = 0x4c4c4548204c4343;  // "CCL HELL"
  std::uint64_t magic;
  std::uint8_t key[32];
  std::int32_t rank;
  std::int32_t ranks;
  std::int64_t patienceMs;
};
static_assert(sizeof(Hello) == 56);

struct Head {
  std::uint32_t bytes;  // that follow
  std::int32_t code;    // down: not 0 when they are an error's text
};
static_assert(sizeof(Head) == 8);

constexpr char kAbsent = 0, kThere = 1, kElsewhere = 2;

constexpr std::uint32_t kMostWords = 1024;
constexpr std::int32_t kMostRanks = 65536;

socklen_t nameSocket(const Tag& tag, sockaddr_un& address);

}  // namespace fusco::nccl::wire
