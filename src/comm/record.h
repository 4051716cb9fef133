// What ranks tell each other through the meeting place, and the messages that carry it. Shared between processes of one
// version of the library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include "comm/gpu_place.h"
#include "transport/tcp/address.h"

namespace fusco::comm {

struct UniqueId {
  static constexpr std::uint64_t kMagic = 0x3144494f43535546;  // "FUSCOID1"
  static constexpr std::uint32_t kVersion = 2;
  static constexpr std::uint32_t kByAddress = 1;   // rank 0 opens the meeting place at `address` when it connects
  static constexpr std::uint32_t kEverywhere = 2;  // at all addresses of its host: by `address` others do not reach it

  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t flags;
  std::uint8_t key[32];
  char socketName[48];         // abstract Unix socket of the meeting place, for ranks of its domain
  std::uint64_t domain;        // of the meeting place
  transport::Address address;  // of the meeting place, for all others; none where TCP is off
  std::uint32_t padding;
};
static_assert(sizeof(UniqueId) == 128 && std::is_trivially_copyable_v<UniqueId>);

struct Record {
  static constexpr int kMostAddresses = 8;

  std::int32_t rank;
  std::int32_t ranks;
  std::int32_t nodeId;  // as given
  std::int32_t lanesPerNode;
  std::int64_t pid;
  std::uint64_t process[2];    // random, one per process
  std::uint64_t member;        // random, one per attempt to connect
  std::uint64_t domain;        // who can share memory: boot id, network namespace and FUSCO_HOSTID, hashed
  std::uint64_t boot;          // boot id, hashed
  std::uint64_t pidNamespace;  // in which pid counts, 0 if unknown
  std::uint64_t controlBytes;
  std::uint64_t slotBytes;
  std::int64_t slots;
  std::int64_t initTimeoutMs;
  std::int32_t net;            // Net (fabric.h)
  std::int32_t addressCount;   // 0: the rank cannot be reached by TCP
  std::uint64_t probeAddress;  // of a word in the rank's process
  std::uint64_t probeValue;
  transport::Address addresses[kMostAddresses];  // where it listens, one for each interface
  char hostName[64];
  char socketName[64];
  char settings[72];  // that must be the same on all ranks
  char failure[256];  // not empty: the rank cannot take part, and why
  std::int32_t failureCode;
  GpuPlace gpu;

  std::string describe() const {
    return "rank " + std::to_string(rank) + " (" + hostName + ":" + std::to_string(pid) + ")";
  }
};
static_assert(sizeof(Record) == 816 && std::is_trivially_copyable_v<Record>);

// A rank's first and only message to the meeting place. What comes before the record is the same in every version, so
// that ranks of different versions are told so.
struct Hello {
  static constexpr std::uint64_t kMagic = 0x31494843534f4655;  // "UFOSCHI1"
  static constexpr std::uint32_t kFormat = 4;                  // of all messages at init and between ranks
  std::uint64_t magic = kMagic;
  std::uint32_t format = kFormat;
  std::uint32_t bytes = sizeof(Record);
  std::uint8_t key[32] = {};  // empty on connections that have proved it
  Record record{};
};
static_assert(sizeof(Hello) == 48 + sizeof(Record));
constexpr std::size_t kHelloHead = 48;

// The answer: this head, then `bytes` bytes in messages of at most kAnswerPart: all records by rank, or an error's
// text. Who gets a system error takes it for one of the process that answers.
struct AnswerHead {
  std::uint64_t magic;
  std::int32_t code;
  std::uint32_t reserved;
  std::uint64_t bytes;
};
static_assert(sizeof(AnswerHead) == 24);
constexpr std::size_t kAnswerPart = 16384;

// Frames between the meeting place and who gathers the ranks of another machine for it.
enum class RecordFrame : std::uint32_t {
  hello = 1,   // a Hello
  gone = 2,    // int32: the rank has hung up
  answer = 3,  // an AnswerHead and its bytes
  told = 4,    // nothing: all of its machine's ranks have the answer
};

}  // namespace fusco::comm
