// Whether FUSCO carries a communicator is decided once, when it is made, by all ranks together: they put their records
// on one table, each computes the same choice from it, sets up what it needs, and all vote. One no, one absent rank:
// nobody carries. After that there is no way back.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>

#include "plugin/nccl/meeting.h"

namespace fusco::nccl {

// What a rank puts on the table.
struct Record {
  std::uint32_t protocol = Tag::kProtocol;
  std::uint32_t build = FUSCO_VERSION;
  std::uint64_t settings = 0;  // those that must agree, hashed
  std::uint64_t host = 0;
  std::uint8_t gpu[16] = {};
  std::int32_t ncclVersion = 0;
  std::int32_t ready = 0;  // 0: `reason` tells why this rank cannot
  char hostName[64] = {};
  char reason[152] = {};
  fuscoUniqueId id = {};  // of rank 0
};
static_assert(sizeof(Record) == 392);

struct Choice {
  bool carry = false;
  std::string reason;
};

// Pure, and the same on all ranks.
Choice choose(std::span<const std::optional<Record>> table);

// This process's record; `reason` why it cannot carry, "" if it can.
Record makeRecord(const std::string& reason);

struct Decision {
  bool carried = false;
  std::string reason;
  fuscoComm_t engine = nullptr;
};

// How a rank gets ready once all want to: makes its engine, or throws.
using SetUp = std::function<fuscoComm_t(const fuscoUniqueId& id)>;

// Collective; bounded by about three times patienceMs. Throws only when this rank was cancelled.
Decision decide(const Tag& tag, int rank, int ranks, std::int64_t patienceMs, bool retry, Record record,
                const SetUp& setUp, const std::atomic<bool>* cancelled);

}  // namespace fusco::nccl
