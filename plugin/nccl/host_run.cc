// Carries out groups in host mode: rows over fusco.h, and the collectives that programs need beside them, simply.
#include <algorithm>
#include <cstring>
#include <memory>

#include "plugin/nccl/host.h"

namespace fusco::nccl {

namespace {

// One round of sends and receives on any number of communicators.
class Round {
 public:
  Round() { check(fuscoGroupStart()); }
  Round(const Round&) = delete;
  ~Round() {
    if (open_) fuscoGroupEnd();
  }
  void add(fuscoComm_t comm, const Transfer& t) {
    const void* const list = !t.listed ? nullptr : t.deviceList != nullptr ? t.deviceList : t.list.data();
    check(t.send ? fuscoGatherSend(t.base, t.rows, t.rowBytes, list, fuscoInt64, t.peer, comm, t.stream)
                 : fuscoScatterRecv(t.base, t.rows, t.rowBytes, list, fuscoInt64, t.peer, comm, t.stream));
  }
  void send(fuscoComm_t comm, int peer, const void* data, std::size_t bytes) {
    check(fuscoSend(data, bytes, fuscoInt8, peer, comm, nullptr));
  }
  void receive(fuscoComm_t comm, int peer, void* data, std::size_t bytes) {
    check(fuscoRecv(data, bytes, fuscoInt8, peer, comm, nullptr));
  }
  void run() {
    open_ = false;
    check(fuscoGroupEnd());
  }

 private:
  bool open_ = true;
};

// Element ranges of a tensor, one for each rank.
struct Parts {
  std::size_t count, ranks, bytes;
  std::size_t begin(std::size_t r) const { return count / ranks * r + std::min(r, count % ranks); }
  std::size_t size(std::size_t r) const { return (begin(r + 1) - begin(r)) * bytes; }
  std::size_t offset(std::size_t r) const { return begin(r) * bytes; }
};

class Runner {
 public:
  Runner(Communicator& communicator, const Collective& c)
      : comm_(communicator.engine),
        me_(communicator.rank),
        ranks_(communicator.ranks),
        c_(c),
        element_(bytesOf(c.type, 1)),
        send_(static_cast<const std::byte*>(c.send)),
        receive_(static_cast<std::byte*>(c.receive)) {}

  void run() {
    switch (c_.kind) {
      case CollectiveKind::allGather:
        return allGather();
      case CollectiveKind::broadcast:
        return broadcast();
      case CollectiveKind::allReduce: {
        const Parts parts{c_.count, static_cast<std::size_t>(ranks_), element_};
        reduceMyPart(parts, receive_ + parts.offset(mine()));
        return shareParts(parts);
      }
      case CollectiveKind::reduceScatter:
        return reduceMyPart({c_.count * static_cast<std::size_t>(ranks_), static_cast<std::size_t>(ranks_), element_},
                            receive_);
      case CollectiveKind::reduce:
        return reduceToRoot();
    }
  }

 private:
  std::size_t mine() const { return static_cast<std::size_t>(me_); }

  void allGather() {
    const std::size_t bytes = c_.count * element_;
    std::byte* const own = receive_ + mine() * bytes;
    if (own != send_ && bytes > 0) std::memmove(own, send_, bytes);
    Round round;
    for (int r = 0; r < ranks_; ++r) {
      if (r == me_) continue;
      round.send(comm_, r, own, bytes);
      round.receive(comm_, r, receive_ + static_cast<std::size_t>(r) * bytes, bytes);
    }
    round.run();
  }

  void broadcast() {
    const std::size_t bytes = c_.count * element_;
    Round round;
    if (me_ != c_.root) {
      round.receive(comm_, c_.root, receive_, bytes);
    } else {
      for (int r = 0; r < ranks_; ++r) {
        if (r != me_) round.send(comm_, r, send_, bytes);
      }
    }
    round.run();
    if (me_ == c_.root && receive_ != nullptr && receive_ != send_ && bytes > 0) std::memmove(receive_, send_, bytes);
  }

  // Everybody's share of my part comes here and is reduced in rank order.
  void reduceMyPart(const Parts& parts, std::byte* output) {
    const std::size_t bytes = parts.size(mine());
    const auto others = std::make_unique<std::byte[]>(bytes * static_cast<std::size_t>(ranks_));
    std::vector<const void*> inputs;
    Round round;
    for (int r = 0; r < ranks_; ++r) {
      const auto peer = static_cast<std::size_t>(r);
      if (r == me_) {
        inputs.push_back(send_ + parts.offset(peer));
        continue;
      }
      round.send(comm_, r, send_ + parts.offset(peer), parts.size(peer));
      round.receive(comm_, r, others.get() + peer * bytes, bytes);
      inputs.push_back(others.get() + peer * bytes);
    }
    round.run();
    reduceInOrder(c_.type, c_.operation, inputs, output, bytes / element_);
  }

  void shareParts(const Parts& parts) {
    Round round;
    for (int r = 0; r < ranks_; ++r) {
      if (r == me_) continue;
      const auto peer = static_cast<std::size_t>(r);
      round.send(comm_, r, receive_ + parts.offset(mine()), parts.size(mine()));
      round.receive(comm_, r, receive_ + parts.offset(peer), parts.size(peer));
    }
    round.run();
  }

  void reduceToRoot() {
    const Parts parts{c_.count, static_cast<std::size_t>(ranks_), element_};
    const auto part = std::make_unique<std::byte[]>(parts.size(mine()));
    reduceMyPart(parts, part.get());
    Round round;
    if (me_ != c_.root) {
      round.send(comm_, c_.root, part.get(), parts.size(mine()));
    } else {
      for (int r = 0; r < ranks_; ++r) {
        const auto peer = static_cast<std::size_t>(r);
        if (r != me_) round.receive(comm_, r, receive_ + parts.offset(peer), parts.size(peer));
      }
    }
    round.run();
    if (me_ == c_.root && c_.count > 0) std::memcpy(receive_ + parts.offset(mine()), part.get(), parts.size(mine()));
  }

  const fuscoComm_t comm_;
  const int me_, ranks_;
  const Collective& c_;
  const std::size_t element_;
  const std::byte* const send_;
  std::byte* const receive_;
};

void runOne(const Work& work) {
  Communicator& communicator = *work.communicator;
  for (const Collective& collective : work.collectives) {
    Runner(communicator, collective).run();
    communicator.collectives.fetch_add(1, std::memory_order_relaxed);
  }
  if (work.transfers.empty()) return;
  Round round;
  for (const Transfer& transfer : work.transfers) round.add(communicator.engine, transfer);
  round.run();
}

void count(const Work& work) {
  std::uint64_t bytes = 0;
  for (const Transfer& transfer : work.transfers) bytes += transfer.send ? transfer.rows * transfer.rowBytes : 0;
  work.communicator->carriedCalls.fetch_add(work.transfers.size(), std::memory_order_relaxed);
  work.communicator->carriedBytes.fetch_add(bytes, std::memory_order_relaxed);
}

}  // namespace

void runWork(std::vector<Work> work) {
  // In one order everywhere, so that two threads cannot hold one each and wait for the other.
  std::sort(work.begin(), work.end(),
            [](const Work& a, const Work& b) { return a.communicator.get() < b.communicator.get(); });
  std::vector<std::unique_lock<std::mutex>> locks;
  bool collectives = false;
  for (const Work& one : work) {
    locks.emplace_back(one.communicator->calls);
    collectives = collectives || !one.collectives.empty();
  }
  if (work.size() == 1) {
    runOne(work.front());
  } else if (collectives) {
    // Their rounds depend on what other ranks do on other communicators: each must be able to go on alone.
    std::vector<std::function<void()>> jobs;
    for (const Work& one : work) jobs.emplace_back([&one] { runOne(one); });
    runSideBySide(jobs);
  } else {
    Round round;
    for (const Work& one : work) {
      for (const Transfer& transfer : one.transfers) round.add(one.communicator->engine, transfer);
    }
    round.run();
  }
  for (const Work& one : work) count(one);
}

}  // namespace fusco::nccl
