// What ranks tell each other through the meeting place, and the messages that carry it. Shared between processes of one
// machine and one version of the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

namespace fusco::comm {

struct UniqueId {
  static constexpr std::uint64_t kMagic = 0x3144494f43535546;  // "FUSCOID1"
  static constexpr std::uint32_t kVersion = 1;

  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t reserved;
  std::uint8_t key[32];
  char socketName[64];  // abstract Unix socket of the meeting place
  char padding[16];
};
static_assert(sizeof(UniqueId) == 128 && std::is_trivially_copyable_v<UniqueId>);

struct Record {
  std::int32_t rank;
  std::int32_t ranks;
  std::int32_t nodeId;
  std::int32_t lanesPerNode;
  std::int64_t pid;
  std::uint64_t process[2];    // random, one per process
  std::uint64_t member;        // random, one per attempt to connect
  std::uint64_t machine;       // boot id, hashed
  std::uint64_t pidNamespace;  // in which pid counts, 0 if unknown
  std::uint64_t signature;
  std::uint64_t controlBytes;
  std::uint64_t slotBytes;
  std::int64_t slots;
  std::int64_t initTimeoutMs;
  std::uint64_t probeAddress;  // of a word in the rank's process
  std::uint64_t probeValue;
  char hostName[64];
  char socketName[64];
  char failure[256];  // not empty: the rank cannot take part, and why
  std::int32_t failureCode;
  std::int32_t padding;

  std::string describe() const {
    return "rank " + std::to_string(rank) + " (" + hostName + ":" + std::to_string(pid) + ")";
  }
};
static_assert(sizeof(Record) == 512 && std::is_trivially_copyable_v<Record>);

// A rank's first and only message to the meeting place.
struct Hello {
  static constexpr std::uint64_t kMagic = 0x31494843534f4655;  // "UFOSCHI1"
  std::uint64_t magic;
  std::uint8_t key[32];
  Record record;
};
static_assert(sizeof(Hello) == 552);

// The answer: this head, then `bytes` bytes in messages of at most kAnswerPart: all records by rank, or an error's
// text.
struct AnswerHead {
  std::uint64_t magic;
  std::int32_t code;
  std::uint32_t reserved;
  std::uint64_t bytes;
};
static_assert(sizeof(AnswerHead) == 24);
constexpr std::size_t kAnswerPart = 16384;

}  // namespace fusco::comm
