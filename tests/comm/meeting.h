// Ranks that meet, as threads of a test: records out of thin air, and what all of them were told. Machines are domains
// that the tests make up; everything goes over loopback or this machine's own address.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/point.h"
#include "base/status.h"
#include "comm/bootstrap.h"
#include "comm/record.h"

namespace fusco::comm::testing {

inline Record recordOf(int rank, int ranks, std::uint64_t domain, std::int64_t timeoutMs = 10000) {
  Record record{};
  record.rank = rank;
  record.ranks = ranks;
  record.nodeId = -1;
  record.lanesPerNode = 1;
  record.pid = 1000 + rank;
  record.domain = domain;
  record.initTimeoutMs = timeoutMs;
  std::snprintf(record.hostName, sizeof(record.hostName), "host%d", static_cast<int>(domain));
  return record;
}

struct Met {
  std::string error;
  std::vector<Record> records;
};

// One thread for each record.
inline std::vector<Met> meetAll(const UniqueId& id, const std::vector<Record>& records) {
  std::vector<Met> met(records.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < records.size(); ++i) {
    threads.emplace_back([&, i] {
      try {
        met[i].records = meet(id, records[i], Deadline::afterMs(records[i].initTimeoutMs * 21 / 20 + 5000));
      } catch (const Error& error) {
        met[i].error = "code " + std::to_string(static_cast<int>(error.code())) + ": " + error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  if (met.front().error.empty()) leaveMeetingPlace(id);
  return met;
}

inline void expectComplete(const std::vector<Met>& met) {
  for (const Met& one : met) {
    EXPECT_EQ(one.error, "");
    ASSERT_EQ(one.records.size(), met.size());
    for (std::size_t rank = 0; rank < met.size(); ++rank) EXPECT_EQ(one.records[rank].rank, static_cast<int>(rank));
  }
}

inline void expectErrors(const std::vector<Met>& met, const std::string& code, const std::vector<std::string>& words) {
  for (const Met& one : met) {
    EXPECT_TRUE(one.error.starts_with(code)) << one.error;
    for (const std::string& word : words)
      EXPECT_NE(one.error.find(word), std::string::npos) << word << ": " << one.error;
  }
}

// Which ranks meeting places of this process have taken since this was made.
class Taken {
 public:
  Taken() {
    ranks.store(0);
    pointWatcher.store([](const char* name, int rank) {
      if (std::strcmp(name, "taken") == 0) ranks.fetch_or(1u << rank);
    });
  }
  ~Taken() { pointWatcher.store(nullptr); }
  static void await(unsigned wanted) {
    for (const Deadline patience = Deadline::afterMs(10000); (ranks.load() & wanted) != wanted; usleep(1000)) {
      if (patience.passed()) return ADD_FAILURE() << "taken: " << ranks.load() << ", of " << wanted;
    }
  }

 private:
  static inline std::atomic<unsigned> ranks{0};  // a bit for each
};

// Two ranks near the meeting place, and `hosts` other machines of three.
inline std::vector<Record> severalHosts(const UniqueId& id, int hosts) {
  std::vector<Record> records;
  const int ranks = 2 + 3 * hosts;
  for (int rank = 0; rank < ranks; ++rank) {
    records.push_back(recordOf(rank, ranks, rank < 2 ? id.domain : static_cast<std::uint64_t>(1 + (rank - 2) / 3)));
  }
  return records;
}

}  // namespace fusco::comm::testing
