// What every rank brings, brought to every rank: by mailboxes in shared memory, or by the network's tree.
#include <algorithm>
#include <cstring>

#include "base/clock.h"
#include "base/status.h"
#include "comm/local_fabric.h"

namespace fusco::comm {

using transport::RankHeader;

namespace {

// Of a gather that goes through the tree: what all ranks together bring in a round, and the least of one.
constexpr std::size_t kGatherRoundBytes = std::size_t{1} << 20;
constexpr std::size_t kGatherLeastBytes = 64;

}  // namespace

// Chunks go through the ranks' mailboxes, two rounds in turn: a mailbox is written again only after everyone has begun
// the round between, and so has read it.
void LocalFabric::allGather(const void* mine, std::size_t bytes, void* all, std::int64_t timeoutMs) {
  refuseChild("a collective call");
  const Deadline deadline = Deadline::afterMs(timeoutMs);
  if (network_) {
    return gatherByNetwork(static_cast<const std::byte*>(mine), bytes, static_cast<std::byte*>(all), deadline,
                           timeoutMs);
  }
  std::size_t at = 0;
  do {
    const std::size_t step = std::min(bytes - at, RankHeader::kMailboxBytes);
    gatherRound(static_cast<const std::byte*>(mine) + at, step, bytes, static_cast<std::byte*>(all) + at, bytes,
                deadline, timeoutMs);
    at += step;
  } while (at < bytes);
}

void LocalFabric::gatherByNetwork(const std::byte* mine, std::size_t bytes, std::byte* all, Deadline deadline,
                                  std::int64_t timeoutMs) {
  Tree& tree = network_->tree();
  const std::size_t most = std::max(kGatherRoundBytes / static_cast<std::size_t>(config_.ranks), kGatherLeastBytes);
  std::size_t at = 0;
  do {
    const std::size_t step = std::min(bytes - at, most);
    tree.contribute({reinterpret_cast<const char*>(mine) + at, step}, bytes);
    std::string chunks;
    for (;;) {
      const std::uint32_t seen = bell();
      if (tree.gathered(&chunks)) break;
      check();
      if (deadline.passed()) {
        std::string names;
        for (const int one : tree.late()) names += (names.empty() ? "" : ", ") + names_[one];
        fail(Code::remoteError,
             names_[config_.rank] + " waited " + std::to_string(timeoutMs) + " ms in a collective call for " +
                 (names.empty() ? "ranks that it is not connected to" : names) + "; look whether they are alive");
      }
      sleep(seen, 50000);
    }
    for (std::size_t rank = 0; step > 0 && rank < static_cast<std::size_t>(config_.ranks); ++rank) {
      std::memcpy(all + rank * bytes + at, chunks.data() + rank * step, step);
    }
    at += step;
  } while (at < bytes);
}

void LocalFabric::gatherRound(const std::byte* mine, std::size_t bytes, std::size_t whole, std::byte* all,
                              std::size_t stride, Deadline deadline, std::int64_t timeoutMs) {
  const std::uint64_t round = ++gatherRound_;
  const std::size_t box = round % 2;
  RankHeader& own = *headers_[config_.rank];
  if (bytes > 0) std::memcpy(own.mailbox[box], mine, bytes);
  own.gatherBytes[box] = whole;
  own.gathered.store(round, std::memory_order_release);
  for (int peer = 0; peer < config_.ranks; ++peer) {
    if (peer != config_.rank) headers_[peer]->ring();
  }
  for (int peer = 0; peer < config_.ranks; ++peer) {
    RankHeader& other = *headers_[peer];
    for (;;) {
      const std::uint32_t seen = bell();
      if (other.gathered.load(std::memory_order_acquire) >= round) break;
      check();
      if (deadline.passed()) {
        std::string late;
        for (int one = 0; one < config_.ranks; ++one) {
          if (headers_[one]->gathered.load(std::memory_order_acquire) < round)
            late += (late.empty() ? "" : ", ") + names_[one];
        }
        if (late.empty()) continue;
        fail(Code::remoteError, names_[config_.rank] + " waited " + std::to_string(timeoutMs) +
                                    " ms in a collective call for " + late + "; look whether they are alive");
      }
      sleep(seen, 50000);
    }
    if (other.gatherBytes[box] != whole) {
      fail(Code::invalidUsage, "ranks disagree in a collective call: " + names_[config_.rank] + " brings " +
                                   std::to_string(whole) + " bytes, " + names_[peer] + " " +
                                   std::to_string(other.gatherBytes[box]) + "; call in the same order on all ranks");
    }
    if (bytes > 0) std::memcpy(all + static_cast<std::size_t>(peer) * stride, other.mailbox[box], bytes);
  }
}

}  // namespace fusco::comm
