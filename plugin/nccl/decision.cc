#include "plugin/nccl/decision.h"

#include <unistd.h>

#include <cstring>

#include "plugin/nccl/elsewhere.h"
#include "plugin/nccl/real.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

namespace {

struct Vote {
  std::int32_t yes = 0;
  char reason[252] = {};
};

void copyText(char* to, std::size_t room, const std::string& text) {
  const std::size_t bytes = std::min(text.size(), room - 1);
  std::memcpy(to, text.data(), bytes);
  to[bytes] = 0;
}

std::uint64_t hash(const std::string& text) {
  std::uint64_t value = 0xcbf29ce484222325;
  for (const unsigned char letter : text) value = (value ^ letter) * 0x100000001b3;
  return value;
}

template <typename Value>
std::string wordsOf(const Value& value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
template <typename Value>
Value valueOf(const std::string& words) {
  Value value;
  std::memcpy(&value, words.data(), sizeof value);
  return value;
}

std::string rankText(std::size_t rank, const Record& record) {
  return "rank " + std::to_string(rank) + " (" + std::string(record.hostName, strnlen(record.hostName, 64)) + ")";
}

// The first no, or "".
std::string firstNo(const std::vector<std::optional<std::string>>& votes) {
  for (std::size_t r = 0; r < votes.size(); ++r) {
    if (!votes[r]) return "rank " + std::to_string(r) + " did not vote in time";
    const Vote vote = valueOf<Vote>(*votes[r]);
    if (vote.yes == 0)
      return "rank " + std::to_string(r) + ": " + std::string(vote.reason, strnlen(vote.reason, sizeof vote.reason));
  }
  return {};
}

}  // namespace

Choice choose(std::span<const std::optional<Record>> table) {
  for (std::size_t r = 0; r < table.size(); ++r) {
    if (!table[r])
      return {false, "rank " + std::to_string(r) +
                         " did not show up in time: is libfusco loaded there, in time, with "
                         "the same id?"};
  }
  const Record& first = *table[0];
  for (std::size_t r = 0; r < table.size(); ++r) {
    const Record& record = *table[r];
    const auto differs = [&](const char* what, auto ours, auto theirs) {
      return Choice{false, rankText(r, record) + " and " + rankText(0, first) + " differ in the " + what + ": " +
                               std::to_string(theirs) + " and " + std::to_string(ours)};
    };
    if (record.protocol != first.protocol) return differs("protocol", first.protocol, record.protocol);
    if (record.build != first.build) return differs("version of libfusco", first.build, record.build);
    if (record.settings != first.settings) return differs("settings FUSCO_CARRY or FUSCO_DEVICE", 0, 1);
    if (record.ready == 0)
      return {false, rankText(r, record) + ": " + std::string(record.reason, strnlen(record.reason, 152))};
  }
  return {true, {}};
}

Record makeRecord(const std::string& reason) {
  Record record;
  record.settings = hash(setting("FUSCO_CARRY") + "," + setting("FUSCO_DEVICE"));
  record.host = machineIdentity();
  record.ready = reason.empty() ? 1 : 0;
  copyText(record.reason, sizeof record.reason, reason);
  gethostname(record.hostName, sizeof record.hostName - 1);
  return record;
}

Decision decide(const Tag& tag, int rank, int ranks, std::int64_t patienceMs, bool retry, Record record,
                const SetUp& setUp, const std::atomic<bool>* cancelled) {
  Decision decision;
  Vote vote;
  try {
    Meeting meeting(tag, rank, ranks, patienceMs, retry, cancelled);
    if (rank == 0) check(fuscoGetUniqueId(&record.id));
    std::vector<std::optional<Record>> table;
    for (const auto& words : meeting.exchange(wordsOf(record))) {
      table.push_back(words ? std::optional(valueOf<Record>(*words)) : std::nullopt);
    }
    const Choice choice = choose(table);
    if (!choice.carry) {
      decision.reason = meeting.elsewhere() < 0 ? choice.reason
                                                : "rank " + std::to_string(meeting.elsewhere()) +
                                                      " is on another machine than the process that made the id";
      return decision;
    }
    try {
      decision.engine = setUp(table[0]->id);
      vote.yes = 1;
    } catch (const std::exception& error) {
      copyText(vote.reason, sizeof vote.reason, error.what());
    }
    decision.reason = firstNo(meeting.exchange(wordsOf(vote)));
  } catch (const std::exception& error) {
    decision.reason = error.what();
  }
  decision.carried = decision.reason.empty() && vote.yes != 0;
  if (!decision.carried && decision.engine != nullptr) {
    fuscoCommAbort(decision.engine);
    decision.engine = nullptr;
  }
  return decision;
}

}  // namespace fusco::nccl
