#include "nccl/loop.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>

namespace fusco::test {

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

constexpr int kSteps = 3;       // places in the buffers that iterations take in turn
constexpr int kAggregated = 3;  // iterations in a group
constexpr std::uint8_t kPoison = 0x77;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::size_t kMostBytes = 5003;
#else
constexpr std::size_t kMostBytes = 100'003;
#endif

// A rank that a thread drives.
struct Driven {
  int rank = 0;
  ncclComm_t comm = nullptr;
  cudaStream_t stream = nullptr;
  std::uint8_t *send = nullptr, *receive = nullptr;
  void* registered[2] = {nullptr, nullptr};
};

// Part `part` of what rank `from` sends in step `step`.
Bytes message(int salt, int step, int from, int part, std::size_t bytes) {
  Bytes data(bytes);
  const auto seed = static_cast<std::uint64_t>(salt * kSteps + step) * 100'003 + static_cast<std::uint64_t>(from) * 64 +
                    static_cast<std::uint64_t>(part);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = byteOf(seed, i);
  return data;
}

// One call as nccl-tests makes it for one rank. A buffer is a part of `bytes` for each rank.
struct Call {
  const Driven& me;
  int ranks;
  std::size_t bytes;
  std::uint8_t *send, *receive;

  std::uint8_t* at(std::uint8_t* base, int part) const { return base + static_cast<std::size_t>(part) * bytes; }
  int next() const { return (me.rank + 1) % ranks; }
  int previous() const { return (me.rank + ranks - 1) % ranks; }
  void sendPart(int part, int peer) const { OK(ncclSend(at(send, part), bytes, ncclUint8, peer, me.comm, me.stream)); }
  void receivePart(int part, int peer) const {
    OK(ncclRecv(at(receive, part), bytes, ncclUint8, peer, me.comm, me.stream));
  }
};

// What lies in a part of the receive buffer afterwards; empty: what was there before.
using Arrives = Bytes (*)(int salt, int step, int me, int ranks, int part, std::size_t bytes);

struct Operation {
  const char* name;
  void (*run)(const Call&);
  Arrives arrives;
  bool inPlace = false;  // the send buffer is the receive buffer; unchecked, as in nccl-tests
  bool inOrder = false;  // made of groups that depend on each other
  bool collective = false;
};

Bytes fromEach(int salt, int step, int me, int, int part, std::size_t bytes) {
  return message(salt, step, part, me, bytes);
}
Bytes nothing(int, int, int, int, int, std::size_t) { return {}; }
std::size_t share(int from, int to, std::size_t bytes) { return bytes * static_cast<std::size_t>((from + to) % 3) / 2; }

void alltoall(const Call& c) {
  OK(extra<AlltoAll>("ncclAlltoAll")(c.send, c.receive, c.bytes, ncclUint8, c.me.comm, c.me.stream));
}
// What nccl-tests does before NCCL 2.28.
void alltoallOfPairs(const Call& c) {
  OK(ncclGroupStart());
  for (int peer = 0; peer < c.ranks; ++peer) {
    c.sendPart(peer, peer);
    c.receivePart(peer, peer);
  }
  OK(ncclGroupEnd());
}
void alltoallv(const Call& c) {
  std::vector<std::size_t> sends, receives, displacements;
  for (int peer = 0; peer < c.ranks; ++peer) {
    sends.push_back(share(c.me.rank, peer, c.bytes));
    receives.push_back(share(peer, c.me.rank, c.bytes));
    displacements.push_back(static_cast<std::size_t>(peer) * c.bytes);
  }
  OK(extra<AllToAllv>("ncclAllToAllv")(c.send, sends.data(), displacements.data(), c.receive, receives.data(),
                                       displacements.data(), ncclUint8, c.me.comm, c.me.stream));
}
void sendrecv(const Call& c) {
  OK(ncclGroupStart());
  c.sendPart(0, c.next());
  c.receivePart(0, c.previous());
  OK(ncclGroupEnd());
}
void gather(const Call& c) {
  OK(extra<Rooted>("ncclGather")(c.send, c.receive, c.bytes, ncclUint8, c.ranks - 1, c.me.comm, c.me.stream));
}
void gatherOfPairs(const Call& c) {
  OK(ncclGroupStart());
  c.sendPart(0, 0);
  for (int peer = 0; c.me.rank == 0 && peer < c.ranks; ++peer) c.receivePart(peer, peer);
  OK(ncclGroupEnd());
}
void scatter(const Call& c) {
  OK(extra<Rooted>("ncclScatter")(c.send, c.receive, c.bytes, ncclUint8, c.ranks - 1, c.me.comm, c.me.stream));
}
void scatterOfPairs(const Call& c) {
  OK(ncclGroupStart());
  for (int peer = 0; c.me.rank == 0 && peer < c.ranks; ++peer) c.sendPart(peer, peer);
  c.receivePart(0, 0);
  OK(ncclGroupEnd());
}
// An all-gather of groups, each of which sends on what the one before has received.
void hypercube(const Call& c) {
  OK(ncclGroupStart());
  OK(ncclSend(c.send, c.bytes, ncclUint8, c.me.rank, c.me.comm, c.me.stream));
  c.receivePart(c.me.rank, c.me.rank);
  OK(ncclGroupEnd());
  for (int mask = 1; mask < c.ranks; mask <<= 1) {
    const int mine = c.me.rank & ~(mask - 1), peer = c.me.rank ^ mask;
    const std::size_t bytes = c.bytes * static_cast<std::size_t>(mask);
    OK(ncclGroupStart());
    OK(ncclSend(c.at(c.receive, mine), bytes, ncclUint8, peer, c.me.comm, c.me.stream));
    OK(ncclRecv(c.at(c.receive, mine ^ mask), bytes, ncclUint8, peer, c.me.comm, c.me.stream));
    OK(ncclGroupEnd());
  }
}
void allReduce(const Call& c) {
  OK(ncclAllReduce(c.send, c.receive, c.bytes, ncclUint8, ncclMax, c.me.comm, c.me.stream));
}

const Operation kOperations[] = {
    {"alltoall", alltoall, fromEach},
    {"alltoall of sends and receives", alltoallOfPairs, fromEach},
    {"alltoallv", alltoallv,
     [](int salt, int step, int me, int, int part, std::size_t bytes) {
       Bytes data = message(salt, step, part, me, bytes);
       std::fill(data.begin() + static_cast<std::ptrdiff_t>(share(part, me, bytes)), data.end(), kPoison);
       return data;
     }},
    {"sendrecv", sendrecv,
     [](int salt, int step, int me, int ranks, int part, std::size_t bytes) {
       return part == 0 ? message(salt, step, (me + ranks - 1) % ranks, 0, bytes) : Bytes();
     }},
    {"gather", gather,
     [](int salt, int step, int me, int ranks, int part, std::size_t bytes) {
       return me == ranks - 1 ? message(salt, step, part, 0, bytes) : Bytes();
     }},
    {"gather of sends and receives", gatherOfPairs,
     [](int salt, int step, int me, int, int part, std::size_t bytes) {
       return me == 0 ? message(salt, step, part, 0, bytes) : Bytes();
     }},
    {"scatter", scatter,
     [](int salt, int step, int me, int ranks, int part, std::size_t bytes) {
       return part == 0 ? message(salt, step, ranks - 1, me, bytes) : Bytes();
     }},
    {"scatter of sends and receives", scatterOfPairs,
     [](int salt, int step, int me, int, int part, std::size_t bytes) {
       return part == 0 ? message(salt, step, 0, me, bytes) : Bytes();
     }},
    {"hypercube", hypercube,
     [](int salt, int step, int, int, int part, std::size_t bytes) { return message(salt, step, part, 0, bytes); },
     false, true},
    {"all-reduce", allReduce,
     [](int salt, int step, int, int ranks, int part, std::size_t bytes) {
       Bytes most = part == 0 ? message(salt, step, 0, 0, bytes) : Bytes();
       for (int from = 1; from < ranks; ++from) {
         const Bytes other = message(salt, step, from, 0, most.size());
         for (std::size_t i = 0; i < most.size(); ++i) most[i] = std::max(most[i], other[i]);
       }
       return most;
     },
     false, false, true},
    {"alltoall in place", alltoall, nothing, true},
    {"sendrecv in place", sendrecv, nothing, true},
};

class Thread {
 public:
  Thread(LoopMemory& memory, std::vector<Driven> driven, int ranks, const LoopShape& shape)
      : memory_(memory), driven_(std::move(driven)), ranks_(ranks), shape_(shape) {}

  long run() {
    const std::size_t sizes[] = {4, 1001, kMostBytes};
    room_ = kSteps * span(sizes[2]);
    for (Driven& one : driven_) {
      memory_.use(one.rank);
      one.stream = memory_.makeStream();
      one.send = memory_.allocate(room_);
      one.receive = memory_.allocate(room_);
      if (!shape_.registered) continue;
      const auto enter = extra<CommRegister>("ncclCommRegister");
      OK(enter(one.comm, one.send, room_, &one.registered[0]));
      OK(enter(one.comm, one.receive, room_, &one.registered[1]));
    }
    for (const Operation& operation : kOperations) {
      if (operation.collective && !hasCollectives()) continue;
#if defined(__SANITIZE_THREAD__)
      // Their results are anybody's guess, since ranks read what others write.
      if (operation.inPlace) continue;
#endif
      // One group for several ranks would leave no order between its steps.
      if (operation.inOrder && (driven_.size() > 1 || (ranks_ & (ranks_ - 1)) != 0)) continue;
      for (const std::size_t bytes : sizes) check(operation, bytes);
    }
    for (Driven& one : driven_) {
      memory_.use(one.rank);
      for (void* const handle : one.registered) {
        if (handle != nullptr) OK(extra<CommDeregister>("ncclCommDeregister")(one.comm, handle));
      }
      memory_.release(one.send);
      memory_.release(one.receive);
    }
    return checked_;
  }

 private:
  // Of one iteration in the buffers; odd, so that the next one begins anywhere.
  std::size_t span(std::size_t bytes) const { return bytes * static_cast<std::size_t>(ranks_) + 5; }

  void check(const Operation& operation, std::size_t bytes) {
    ++salt_;
    poison();
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      for (int step = 0; step < kSteps; ++step) {
        Bytes all;
        for (int part = 0; part < ranks_; ++part) {
          const Bytes data = message(salt_, step, one.rank, part, bytes);
          all.insert(all.end(), data.begin(), data.end());
        }
        memory_.write(one.send + static_cast<std::size_t>(step) * span(bytes), all);
      }
    }
    for (int iteration = 0; iteration < kSteps; ++iteration) start(operation, bytes, iteration);
    complete();
    if (!operation.inOrder) {
      OK(ncclGroupStart());
      for (int iteration = 0; iteration < kAggregated; ++iteration) start(operation, bytes, iteration);
      OK(ncclGroupEnd());
      complete();
    }
    expectAll(operation, bytes);
    if (shape_.graphs) replay(operation, bytes);
    ++checked_;
  }

  void poison() {
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      memory_.write(one.receive, Bytes(room_, kPoison));
    }
  }

  // All iterations in one graph, launched twice.
  void replay(const Operation& operation, std::size_t bytes) {
    poison();
    std::vector<void*> graphs;
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      memory_.capture(one.stream);
    }
    for (int iteration = 0; iteration < kSteps; ++iteration) start(operation, bytes, iteration);
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      graphs.push_back(memory_.endCapture(one.stream));
    }
    for (int launch = 0; launch < 2; ++launch) {
      for (std::size_t i = 0; i < driven_.size(); ++i) {
        memory_.use(driven_[i].rank);
        memory_.launch(graphs[i], driven_[i].stream);
      }
    }
    complete();
    for (void* const graph : graphs) memory_.releaseGraph(graph);
    expectAll(operation, bytes);
  }

  void expectAll(const Operation& operation, std::size_t bytes) {
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      for (int step = 0; step < kSteps && !operation.inPlace; ++step) expect(operation, one, bytes, step);
    }
  }

  void start(const Operation& operation, std::size_t bytes, int iteration) {
    const std::size_t shift = static_cast<std::size_t>(iteration % kSteps) * span(bytes);
    if (driven_.size() > 1) OK(ncclGroupStart());
    for (const Driven& one : driven_) {
      memory_.use(one.rank);
      std::uint8_t* const receive = one.receive + shift;
      operation.run({one, ranks_, bytes, operation.inPlace ? receive : one.send + shift, receive});
    }
    if (driven_.size() > 1) OK(ncclGroupEnd());
  }

  void complete() {
    const auto start = Clock::now();
    std::vector<bool> done(driven_.size(), false);
    while (std::find(done.begin(), done.end(), false) != done.end()) {
      for (std::size_t i = 0; i < driven_.size(); ++i) {
        if (done[i]) continue;
        memory_.use(driven_[i].rank);
        done[i] = memory_.done(driven_[i].stream);
        ncclResult_t state = ncclSuccess;
        OK(ncclCommGetAsyncError(driven_[i].comm, &state));
        ok(state, "the state of a communicator");
      }
      require(Clock::now() - start < std::chrono::seconds(20), "an operation does not end");
    }
  }

  void expect(const Operation& operation, const Driven& one, std::size_t bytes, int step) {
    const Bytes got = memory_.read(one.receive + static_cast<std::size_t>(step) * span(bytes), span(bytes));
    Bytes wanted(got.size(), kPoison);
    for (int part = 0; part < ranks_; ++part) {
      const Bytes arrived = operation.arrives(salt_, step, one.rank, ranks_, part, bytes);
      std::copy(arrived.begin(), arrived.end(),
                wanted.begin() + static_cast<std::ptrdiff_t>(part) * static_cast<std::ptrdiff_t>(bytes));
    }
    if (got == wanted) return;
    const auto wrong = std::mismatch(got.begin(), got.end(), wanted.begin()).first - got.begin();
    throw std::runtime_error(std::string(operation.name) + " of " + std::to_string(bytes) + " bytes, rank " +
                             std::to_string(one.rank) + ", step " + std::to_string(step) + ": byte " +
                             std::to_string(wrong) + " is wrong");
  }

  LoopMemory& memory_;
  std::vector<Driven> driven_;
  const int ranks_;
  const LoopShape shape_;
  std::size_t room_ = 0;
  int salt_ = 0;
  long checked_ = 0;
};

}  // namespace

LoopShape loopShape(int threads, int ranksOfThread, const std::string& how) {
  return {threads, ranksOfThread, how == "all", how == "registered", how == "graph"};
}

long loop(const Rank& process, const LoopShape& shape, LoopMemory& memory) {
  const int own = shape.threads * shape.ranksOfThread, ranks = own * process.ranks;
  std::vector<ncclComm_t> comms(static_cast<std::size_t>(own));
  if (shape.initAll) {
    require(process.ranks == 1, "all ranks of one process");
    const std::vector<int> devices = memory.devices(own);
    OK(ncclCommInitAll(comms.data(), own, devices.empty() ? nullptr : devices.data()));
  } else {
    const ncclUniqueId id = process.id(0);
    OK(ncclGroupStart());
    for (int i = 0; i < own; ++i) {
      const int rank = process.rank * own + i;
      memory.use(rank);
      ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
      OK(ncclCommInitRankConfig(&comms[static_cast<std::size_t>(i)], ranks, id, rank, &config));
    }
    OK(ncclGroupEnd());
  }
  std::vector<std::thread> threads;
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(shape.threads));
  std::vector<long> checked(errors.size());
  for (int t = 0; t < shape.threads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<Driven> driven(static_cast<std::size_t>(shape.ranksOfThread));
      for (int i = 0; i < shape.ranksOfThread; ++i) {
        const int local = t * shape.ranksOfThread + i;
        driven[static_cast<std::size_t>(i)].rank = process.rank * own + local;
        driven[static_cast<std::size_t>(i)].comm = comms[static_cast<std::size_t>(local)];
      }
      try {
        checked[static_cast<std::size_t>(t)] = Thread(memory, std::move(driven), ranks, shape).run();
      } catch (...) {
        errors[static_cast<std::size_t>(t)] = std::current_exception();
        // The others may wait for this one.
        for (const ncclComm_t comm : comms) ncclCommAbort(comm);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  for (const ncclComm_t comm : comms) OK(ncclCommDestroy(comm));
  return *std::min_element(checked.begin(), checked.end());
}

}  // namespace fusco::test
