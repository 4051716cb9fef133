// Random groups of sends and receives: several communicators, threads, streams, self, zero counts, nested groups, peers
// in any order, plain and by lists of rows. Every byte is checked, and those beside.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <tuple>

#include "nccl/program.h"

namespace fusco::test {

namespace {

constexpr std::uint8_t kPoison = 0xa7;
constexpr std::size_t kGuard = 16;
constexpr std::size_t kMostBytes = 16384;  // of a message

struct Message {
  int comm = 0;          // index of a communicator as all ranks count them
  int from = 0, to = 0;  // ranks of the program
  std::size_t rows = 0, rowBytes = 1;
  bool sendListed = false, receiveListed = false;
  std::uint64_t seed = 0;
  std::vector<std::int64_t> sendList, receiveList;
  std::size_t bytes() const { return rows * rowBytes; }
};

struct World {
  std::vector<std::vector<int>> members;  // of each communicator, in its rank order
  std::vector<ncclComm_t> comms;          // null where we are no member
  int rankIn(int comm, int rank) const {
    const auto& all = members[static_cast<std::size_t>(comm)];
    return static_cast<int>(std::find(all.begin(), all.end(), rank) - all.begin());
  }
};

World connect(const Rank& self, int thread) {
  World world;
  std::vector<int> all(static_cast<std::size_t>(self.ranks)), parity[2];
  std::iota(all.begin(), all.end(), 0);
  for (const int r : all) parity[r % 2].push_back(r);
  ncclComm_t whole = self.connect(thread), reversed = nullptr, half = nullptr;
  OK(ncclCommSplit(whole, 0, -self.rank, &reversed, nullptr));
  OK(ncclCommSplit(whole, self.rank % 2, self.rank, &half, nullptr));
  world.members = {all, {all.rbegin(), all.rend()}, parity[0], parity[1]};
  world.comms = {whole, reversed, self.rank % 2 == 0 ? half : nullptr, self.rank % 2 == 1 ? half : nullptr};
  for (std::size_t c = 0; c < world.comms.size(); ++c) {
    if (world.comms[c] == nullptr) continue;
    int rank = -1;
    OK(ncclCommUserRank(world.comms[c], &rank));
    require(rank == world.rankIn(static_cast<int>(c), self.rank), "rank in a split communicator");
  }
  return world;
}

std::size_t pick(std::mt19937_64& random, std::size_t low, std::size_t high) {
  return std::uniform_int_distribution<std::size_t>(low, high)(random);
}

Message randomMessage(std::mt19937_64& random, const World& world) {
  Message m;
  do {
    m.comm = static_cast<int>(pick(random, 0, 3));
  } while (world.members[static_cast<std::size_t>(m.comm)].empty());
  const auto& members = world.members[static_cast<std::size_t>(m.comm)];
  m.from = members[pick(random, 0, members.size() - 1)];
  m.to = members[pick(random, 0, members.size() - 1)];
  static constexpr std::size_t kRowBytes[] = {1, 2, 4, 12, 100, 1024, 7168};
  m.rowBytes = kRowBytes[pick(random, 0, std::size(kRowBytes) - 1)];
  m.rows = pick(random, 0, 4) == 0 ? 0 : pick(random, 1, std::clamp<std::size_t>(kMostBytes / m.rowBytes, 1, 24));
  m.sendListed = pick(random, 0, 3) == 0;
  m.receiveListed = pick(random, 0, 3) == 0;
  m.seed = random();
  const std::size_t span = m.rows + pick(random, 0, 5);
  std::vector<std::int64_t> order(span);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (std::size_t k = 0; k < m.rows; ++k) {
    m.sendList.push_back(static_cast<std::int64_t>(pick(random, 0, span - 1)));  // repeats are legal
    m.receiveList.push_back(order[k]);
  }
  return m;
}

// One end of a message at this rank.
class End {
 public:
  End(const Message& m, bool send) : m_(m), send_(send), listed_(send ? m.sendListed : m.receiveListed) {
    std::size_t rows = m.rows;
    if (listed_) {
      for (const std::int64_t row : list()) rows = std::max(rows, static_cast<std::size_t>(row) + 1);
    }
    bytes_ = rows * m.rowBytes;
    memory_.reset(static_cast<std::uint8_t*>(std::malloc(bytes_ + 2 * kGuard)));
    std::memset(memory_.get(), kPoison, bytes_ + 2 * kGuard);
    // A row that is sent twice is the same twice: its bytes come from the last place that names it.
    for (std::size_t i = 0; send_ && i < m.bytes(); ++i) data()[offset(i)] = byteOf(m.seed, i);
    if (send_) {
      sent_.resize(m.bytes());
      for (std::size_t i = 0; i < m.bytes(); ++i) sent_[i] = data()[offset(i)];
    }
  }
  const Message& message() const { return m_; }
  bool send() const { return send_; }

  void post(const World& world, int rank, std::mt19937_64& random) {
    const ncclComm_t comm = world.comms[static_cast<std::size_t>(m_.comm)];
    const int peer = world.rankIn(m_.comm, send_ ? m_.to : m_.from);
    (void)rank;
    // Streams are told apart by nothing in host mode: any will do.
    const auto stream = reinterpret_cast<cudaStream_t>(pick(random, 0, 3));
    if (listed_) {
      static const auto gather = extra<GatherSend>("gatherSend");
      static const auto scatter = extra<ScatterRecv>("scatterRecv");
      const int segment = static_cast<int>(m_.rowBytes);
      OK(send_ ? gather(data(), m_.bytes(), ncclInt8, peer, comm, stream, list().data(), segment)
               : scatter(data(), m_.bytes(), ncclUint8, peer, comm, stream, list().data(), segment));
    } else {
      const bool wide = m_.rowBytes % 4 == 0;
      const std::size_t count = wide ? m_.bytes() / 4 : m_.bytes();
      const ncclDataType_t type = wide ? ncclFloat32 : ncclInt8;
      OK(send_ ? ncclSend(data(), count, type, peer, comm, stream) : ncclRecv(data(), count, type, peer, comm, stream));
    }
  }

  // What the sender's tensor held at this place, known from the seed alone.
  void checkReceived() const {
    const End sender(m_, true);
    std::vector<bool> written(bytes_);
    for (std::size_t i = 0; i < m_.bytes(); ++i) {
      if (data()[offset(i)] != sender.sent_[i]) {
        throw std::runtime_error("byte " + std::to_string(i) + " of " + std::to_string(m_.bytes()) + " from " +
                                 std::to_string(m_.from) + " to " + std::to_string(m_.to) + " is wrong");
      }
      written[offset(i)] = true;
    }
    for (std::size_t i = 0; i < bytes_; ++i) require(written[i] || data()[i] == kPoison, "a row beside was written");
    for (std::size_t i = 0; i < kGuard; ++i)
      require(memory_.get()[i] == kPoison && data()[bytes_ + i] == kPoison, "memory beside the tensor was written");
  }

 private:
  const std::vector<std::int64_t>& list() const { return send_ ? m_.sendList : m_.receiveList; }
  std::size_t offset(std::size_t i) const {
    return listed_ ? static_cast<std::size_t>(list()[i / m_.rowBytes]) * m_.rowBytes + i % m_.rowBytes : i;
  }
  std::uint8_t* data() const { return memory_.get() + kGuard; }

  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const Message& m_;
  const bool send_, listed_;
  std::size_t bytes_ = 0;
  std::unique_ptr<std::uint8_t, Free> memory_;
  std::vector<std::uint8_t> sent_;
};

// Any order in which the ends of each ordered pair on a communicator keep theirs.
void shuffleEnds(std::vector<std::unique_ptr<End>>& ends, std::mt19937_64& random) {
  std::vector<std::size_t> order(ends.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::shuffle(order.begin(), order.end(), random);
  const auto key = [&](std::size_t i) {
    const Message& m = ends[i]->message();
    return std::tuple(ends[i]->send(), m.comm, m.from, m.to);
  };
  for (std::size_t a = 0; a < order.size(); ++a) {
    for (std::size_t b = a + 1; b < order.size(); ++b) {
      if (key(order[a]) == key(order[b]) && order[a] > order[b]) std::swap(order[a], order[b]);
    }
  }
  std::vector<std::unique_ptr<End>> shuffled;
  for (const std::size_t i : order) shuffled.push_back(std::move(ends[i]));
  ends = std::move(shuffled);
}

void oneGroup(const Rank& self, const World& world, std::mt19937_64& shared, std::mt19937_64& own) {
  const std::size_t count = pick(shared, 0, 12);
  std::vector<Message> messages;
  for (std::size_t i = 0; i < count; ++i) messages.push_back(randomMessage(shared, world));
  const bool reduces = pick(shared, 0, 7) == 0 && hasCollectives();
  std::vector<std::unique_ptr<End>> ends;
  for (const Message& m : messages) {
    if (m.from == self.rank) ends.push_back(std::make_unique<End>(m, true));
    if (m.to == self.rank) ends.push_back(std::make_unique<End>(m, false));
  }
  shuffleEnds(ends, own);
  const bool alone = count == 1 && !reduces && messages[0].from != messages[0].to && pick(own, 0, 1) == 0;
  const std::size_t depth = alone ? 0 : pick(own, 1, 3);
  std::int32_t sum = self.rank + 1;
  for (std::size_t d = 0; d < depth; ++d) OK(ncclGroupStart());
  for (const auto& end : ends) {
    const bool nested = pick(own, 0, 4) == 0 && !alone;
    if (nested) OK(ncclGroupStart());
    end->post(world, self.rank, own);
    if (nested) OK(ncclGroupEnd());
  }
  if (reduces) OK(ncclAllReduce(&sum, &sum, 1, ncclInt32, ncclSum, world.comms[0], nullptr));
  for (std::size_t d = 0; d < depth; ++d) OK(ncclGroupEnd());
  for (const auto& end : ends) {
    if (!end->send()) end->checkReceived();
  }
  if (reduces) require(sum == self.ranks * (self.ranks + 1) / 2, "the sum beside the messages is wrong");
}

}  // namespace

void randomGroups(const Rank& self, std::uint64_t seed, int groups, int threads) {
  std::vector<std::string> wrong(static_cast<std::size_t>(threads));
  const auto one = [&](int thread) {
    try {
      const World world = connect(self, thread);
      std::mt19937_64 shared(seed * 1000 + static_cast<std::uint64_t>(thread));
      std::mt19937_64 own(seed * 7777 + static_cast<std::uint64_t>(thread * 64 + self.rank));
      for (int g = 0; g < groups; ++g) {
        try {
          oneGroup(self, world, shared, own);
        } catch (const std::exception& error) {
          throw std::runtime_error("seed " + std::to_string(seed) + ", thread " + std::to_string(thread) + ", group " +
                                   std::to_string(g) + ": " + error.what());
        }
      }
      for (const ncclComm_t comm : world.comms) {
        if (comm != nullptr) OK(ncclCommDestroy(comm));
      }
    } catch (const std::exception& error) {
      wrong[static_cast<std::size_t>(thread)] = error.what();
    }
  };
  // Ids are made in one order: rank 0 makes all of them first.
  for (int t = 0; t < threads; ++t) self.id(t);
  std::vector<std::thread> running;
  for (int t = 0; t < threads; ++t) running.emplace_back(one, t);
  for (std::thread& thread : running) thread.join();
  for (const std::string& text : wrong) require(text.empty(), text);
}

}  // namespace fusco::test
