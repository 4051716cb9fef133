// What comes to the port at which ranks meet, and from ranks on the connections after that: handshakes, frames,
// greetings, answers, and the messages of the tree. The first byte of an input says which.
#include "comm/bootstrap.h"

#include <poll.h>
#include <sys/socket.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "base/status.h"
#include "comm/frames.h"
#include "comm/handshake.h"
#include "comm/rendezvous.h"
#include "comm/tree.h"
#include "fuzz/fuzz.h"
#include "transport/local/socket.h"

using namespace fusco;
using namespace fusco::comm;

namespace {

constexpr std::uint8_t kKey[32] = {1, 2, 3};

struct Pair {
  UniqueFd ours, theirs;
  Pair() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) != 0) std::exit(1);
    ours = UniqueFd(ends[0]);
    theirs = UniqueFd(ends[1]);
  }
  void send(std::string_view bytes) const {
    if (!bytes.empty()) (void)!::send(theirs.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
};

// Nobody proves itself without the key: the other side's random bytes are in what has to be proved.
void shakeHands(Handshake::Side side, fuzz::Input input) {
  const Pair pair;
  Handshake handshake(side, kKey, {Purpose::tree, 1, 0, 0});
  Handshake::Result result = Handshake::Result::again;
  while (result == Handshake::Result::again && !input.empty()) {
    pair.send(input.piece());
    result = handshake.step(pair.ours.get());
  }
  fuzz::require(result == Handshake::Result::again || result == Handshake::Result::failed, "a proof without the key");
}

void readFrames(fuzz::Input input) {
  const Pair pair;
  const std::size_t most = 1 + input.byte() * std::size_t{16};
  Frames frames(most);
  Frames::State state = Frames::State::open;
  std::size_t sent = 0, heard = 0;
  while (state == Frames::State::open && !input.empty()) {
    const std::string_view piece = input.piece();
    pair.send(piece);
    sent += piece.size();
    state = frames.receive(pair.ours.get(), [&](std::uint32_t, std::string_view body) {
      fuzz::require(body.size() <= most, "a frame that is too long");
      heard += sizeof(Frames::Head) + body.size();
    });
  }
  fuzz::require(heard <= sent, "bytes that nobody has sent");
}

// Ranks and strangers that send a message each and hang up: the meeting place comes to an end whatever they say.
void meetAll(fuzz::Input input) {
  UniqueId id{};
  id.magic = UniqueId::kMagic;
  std::memcpy(id.key, kKey, sizeof(id.key));
  static const std::string name = transport::randomName("fusco-fuzz-");
  const UniqueFd listener = transport::listenAbstract(name, 64);
  {
    std::vector<UniqueFd> callers;
    while (!input.empty() && callers.size() < 8) {
      std::string message(input.piece());
      // As an authenticated rank would say it, with a time-out that ends.
      if (message.size() >= kHelloHead) std::memcpy(message.data() + offsetof(Hello, key), kKey, sizeof(kKey));
      const std::size_t timeout = offsetof(Hello, record) + offsetof(Record, initTimeoutMs);
      const std::int64_t soon = 1;
      if (message.size() >= timeout + sizeof(soon)) std::memcpy(message.data() + timeout, &soon, sizeof(soon));
      callers.push_back(transport::connectAbstract(name, Deadline::afterMs(1000)));
      if (!callers.back()) return;
      if (!message.empty()) transport::sendMessage(callers.back().get(), message.data(), message.size());
    }
  }
  Lobby::Patience patience;
  patience.silentCallerMs = 1;
  patience.lateComersMs = 1;
  patience.nobodyMs = 1;
  std::atomic<bool> stop{false};
  Rendezvous(id, listener.get(), -1, patience).serve(stop);
}

void readGreeting(fuzz::Input input) {
  const std::string_view message = input.take(input.left());
  Hello hello;
  if (Lobby::readHello(message.data(), message.size(), &hello) != Lobby::Greeting::rank) return;
  const Record& record = hello.record;
  fuzz::require(record.rank >= 0 && record.rank < record.ranks, "a rank out of range");
  fuzz::require(record.describe().size() < 128 && std::string(record.failure).size() < sizeof(record.failure),
                "a text without end");
}

// A rank hears an answer from the process that it takes for the meeting place.
void hearAnswer(fuzz::Input input) {
  UniqueId id{};
  id.magic = UniqueId::kMagic;
  std::memcpy(id.key, kKey, sizeof(id.key));
  static const std::string name = transport::randomName("fusco-fuzz-");
  std::memcpy(id.socketName, name.c_str(), name.size() + 1);
  const UniqueFd listener = transport::listenAbstract(name, 64);
  std::thread host([&] {
    pollfd polled{listener.get(), POLLIN, 0};
    if (::poll(&polled, 1, 1000) != 1) return;
    bool exhausted = false;
    const UniqueFd caller = transport::acceptOne(listener.get(), &exhausted);
    while (caller && !input.empty()) {
      const std::string_view piece = input.piece();
      if (!piece.empty() && transport::sendMessage(caller.get(), piece.data(), piece.size()) != transport::Io::done)
        break;
    }
  });
  Record record{};
  record.ranks = 2;
  try {
    const auto records = meet(id, record, Deadline::afterMs(2000));
    fuzz::require(records.size() == 2, "records of other ranks");
  } catch (const Error&) {
    // Told with a text.
  }
  host.join();
}

// A neighbour in the tree. Its end is news, and by then all that it said has been heard.
void hearTree(fuzz::Input input) {
  static auto* const reactor = new transport::Reactor;
  std::mutex mutex;
  std::condition_variable changed;
  bool fallen = false;
  Pair pair;
  Tree::Ways ways;
  ways.hear = [&](const News& news) {
    fuzz::require(news.rank >= 0 && news.rank < 4, "news of a rank that does not exist");
    std::lock_guard lock(mutex);
    fallen = fallen || news.kind == News::died;
    changed.notify_all();
  };
  ways.ringBell = [] {};
  ways.nameOf = [](int rank) { return "rank " + std::to_string(rank); };
  Tree::Patience patience;
  patience.beatMs = 3600000;
  const bool child = (input.byte() & 1) != 0;
  Tree tree(*reactor, child ? 0 : 1, 4, child ? TreeShape{-1, {1, 2}} : TreeShape{0, {3}}, ways, patience);
  if ((input.byte() & 1) != 0) tree.contribute("own chunk", 9);
  tree.attach(child ? 1 : 0, std::move(pair.ours));
  while (!input.empty()) pair.send(input.piece());
  pair.theirs.reset();
  std::unique_lock lock(mutex);
  // After a farewell there is no news of the end.
  changed.wait_for(lock, std::chrono::milliseconds(20), [&] { return fallen; });
  lock.unlock();
  std::string all;
  try {
    tree.gathered(&all);
  } catch (const Error&) {
    // Told that chunks differ.
  }
}

std::string greeting(int rank, int ranks) {
  Hello hello;
  std::memcpy(hello.key, kKey, sizeof(kKey));
  hello.record.rank = rank;
  hello.record.ranks = ranks;
  std::strcpy(hello.record.hostName, "somewhere");
  return std::string(reinterpret_cast<const char*>(&hello), sizeof(hello));
}

std::string frameOf(std::uint32_t kind, std::string_view body) {
  const Frames::Head head{kind, static_cast<std::uint32_t>(body.size())};
  return std::string(reinterpret_cast<const char*>(&head), sizeof(head)) + std::string(body);
}

template <typename... Words>
std::string words(Words... all) {
  std::string bytes;
  (bytes.append(reinterpret_cast<const char*>(&all), sizeof(all)), ...);
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  switch (input.byte() % 7) {
    case 0:
      shakeHands(Handshake::Side::host, input);
      break;
    case 1:
      shakeHands(Handshake::Side::caller, input);
      break;
    case 2:
      readFrames(input);
      break;
    case 3:
      meetAll(input);
      break;
    case 4:
      readGreeting(input);
      break;
    case 5:
      hearAnswer(input);
      break;
    case 6:
      hearTree(input);
      break;
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  using fuzz::pieceOf;
  const std::uint64_t magic = 0x314B485343535546;
  const std::string random(32, 'r');
  const std::string caller = words(magic, Purpose{Purpose::tree, 1, 0, 0}) + random;
  std::vector<std::string> all = {
      std::string(1, 0) + pieceOf(caller) + pieceOf(random),
      std::string(1, 0) + pieceOf(caller.substr(0, 20)) + pieceOf(caller.substr(20)) + pieceOf(random),
      std::string(1, 1) + pieceOf(words(magic) + random + random),
      std::string(1, 2) + '\x10' + pieceOf(frameOf(1, "abc") + frameOf(2, "").substr(0, 5)) +
          pieceOf(frameOf(2, "").substr(5)),
      std::string(1, 3) + pieceOf(greeting(0, 2)) + pieceOf(greeting(1, 2)),
      std::string(1, 3) + pieceOf(greeting(0, 1)) + pieceOf("garbage"),
      std::string(1, 3) + pieceOf(greeting(0, 2)) + pieceOf(greeting(0, 3)) + pieceOf(""),
      std::string(1, 4) + greeting(1, 2)};
  const AnswerHead head{Hello::kMagic, 0, 0, 2 * sizeof(Record)};
  const std::string records = greeting(0, 2).substr(kHelloHead) + greeting(1, 2).substr(kHelloHead);
  all.push_back(std::string(1, 5) + pieceOf(words(head)) + pieceOf(records));
  all.push_back(std::string(1, 5) + pieceOf(words(AnswerHead{Hello::kMagic, 6, 0, 5})) + pieceOf("wrong"));
  // up, down, news, beat
  const std::string up = frameOf(3, words(std::uint64_t{1}, std::uint64_t{9}, 1, 0) + "own chunk");
  const std::string down =
      frameOf(4, words(std::uint64_t{1}, -1, -1, std::uint64_t{9}, std::uint64_t{9}) + std::string(36, 'c'));
  const std::string news = frameOf(2, words(4u, 2) + std::string("died"));
  for (const std::string& wire : {up, down, news, frameOf(1, ""), up + news, down + up})
    for (const char child : {0, 1}) all.push_back(std::string(1, 6) + child + '\x01' + pieceOf(wire));
  return all;
}
