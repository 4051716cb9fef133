#include "comm/bootstrap.h"

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "base/environment.h"
#include "base/log.h"
#include "base/point.h"
#include "base/status.h"
#include "base/thread.h"
#include "comm/fabric.h"
#include "comm/relay.h"
#include "comm/rendezvous.h"
#include "transport/local/socket.h"
#include "transport/tcp/connect.h"

namespace fusco::comm {

namespace {

struct Place {
  UniqueId id;
  UniqueFd listener, network;  // under the lock, so that a fork finds them open or closed
  std::atomic<bool> stop{false};
  std::atomic<bool> finished{false};
  std::unique_ptr<Lobby> lobby;  // here and not in the thread: a forked child still finds its memory
  std::thread thread;
};

struct Process {
  std::mutex mutex;
  std::list<std::unique_ptr<Place>> places;
  std::list<std::unique_ptr<Place>> inherited;  // of the parent: their threads do not exist here
  std::uint64_t identity[2] = {0, 0};
  std::atomic<unsigned> forks{0};
  std::map<std::string, std::uint32_t> agreements;  // made so far, by address, secret and job
};

void joinFinished(std::list<std::unique_ptr<Place>>& places);
void endAll();
void beforeFork();
void afterForkInChild();

// Never destroyed: a thread of it may outlive main.
Process& process() {
  static Process* const instance = [] {
    auto* made = new Process;
    transport::randomBytes(made->identity, sizeof(made->identity));
    return made;
  }();
  static const int registered =
      ::pthread_atfork([] { beforeFork(); }, [] { process().mutex.unlock(); }, [] { afterForkInChild(); });
  static const int atExit = std::atexit([] { endAll(); });
  (void)registered;
  (void)atExit;
  return *instance;
}

// The child has copies of the listeners, but none of the threads behind them.
void afterForkInChild() {
  Process& self = process();
  for (auto& place : self.places) {
    place->listener.reset();
    place->network.reset();
  }
  self.inherited.splice(self.inherited.end(), self.places);
  transport::randomBytes(self.identity, sizeof(self.identity));
  self.forks.fetch_add(1, std::memory_order_relaxed);
  self.mutex.unlock();
}

void joinFinished(std::list<std::unique_ptr<Place>>& places) {
  for (auto place = places.begin(); place != places.end();) {
    if ((*place)->finished.load(std::memory_order_acquire)) {
      (*place)->thread.join();
      place = places.erase(place);
    } else {
      ++place;
    }
  }
}

// At exit no thread stays behind; ranks that still wait see the meeting place close.
void endAll() {
  std::list<std::unique_ptr<Place>> ending;
  {
    std::lock_guard lock(process().mutex);
    ending.swap(process().places);
    for (auto& place : ending) {
      place->stop.store(true);
      // Wakes the thread.
      if (place->listener) ::shutdown(place->listener.get(), SHUT_RDWR);
    }
  }
  for (auto& place : ending) place->thread.join();
}

// Threads that have ended are joined, or the child would inherit what it can never join.
void beforeFork() {
  process().mutex.lock();
  joinFinished(process().places);
}

// Of a machine, before a rank of it gives up.
constexpr int kMostRelaysLost = 8;
constexpr std::uint64_t kMostErrorText = 64 * 1024;

[[noreturn]] void failClosed(const Record& record) {
  fail(Code::remoteError, record.describe() +
                              " found nobody at the meeting place of this id: the process that made the id has ended, "
                              "or the id has been used; an id serves one init only");
}

// Waits until the socket can be read.
void awaitAnswer(int socket, const Record& record, Deadline deadline, const char* whose) {
  for (;;) {
    pollfd polled{socket, POLLIN, 0};
    if (::poll(&polled, 1, transport::pollMs(deadline, 60000)) > 0) return;
    if (deadline.passed()) {
      fail(Code::remoteError, record.describe() + " got no answer at init from " + whose + " (pid " +
                                  std::to_string(transport::credentialsOf(socket).pid) +
                                  "); it may be stopped or overloaded");
    }
  }
}

// `whose` is the process at the other end. None: it has hung up.
std::optional<std::string> receivePart(int socket, const Record& record, Deadline deadline, const char* whose) {
  std::string part(kAnswerPart, 0);
  for (;;) {
    awaitAnswer(socket, record, deadline, whose);
    std::size_t bytes = 0;
    const transport::Io io = transport::receiveMessage(socket, part.data(), part.size(), &bytes);
    if (io == transport::Io::again) continue;
    if (io == transport::Io::closed) return std::nullopt;
    if (bytes > part.size()) fail(Code::internalError, record.describe() + " got a malformed answer at init");
    part.resize(bytes);
    return part;
  }
}

struct Answer {
  AnswerHead head{};
  std::string body;
};

std::optional<Answer> receiveAnswer(int socket, const Record& record, Deadline deadline, const char* whose) {
  std::optional<std::string> part = receivePart(socket, record, deadline, whose);
  if (!part) return std::nullopt;
  Answer answer;
  if (part->size() == sizeof(answer.head)) std::memcpy(&answer.head, part->data(), sizeof(answer.head));
  if (answer.head.magic != Hello::kMagic) {
    fail(Code::internalError, record.describe() + " got a malformed answer at init");
  }
  // The other end says how much will come: no more is taken than all records or an error's text can be.
  const std::uint64_t records = static_cast<std::uint64_t>(record.ranks) * sizeof(Record);
  if (answer.head.code == 0 ? answer.head.bytes != records : answer.head.bytes > kMostErrorText) {
    fail(Code::internalError, record.describe() + " got an answer of " + std::to_string(answer.head.bytes) +
                                  " bytes at init, which none can have; is another version of FUSCO at the other end?");
  }
  while (answer.body.size() < answer.head.bytes) {
    part = receivePart(socket, record, deadline, whose);
    if (!part) return std::nullopt;
    answer.body += *part;
  }
  return answer;
}

}  // namespace

unsigned forkCount() { return process().forks.load(std::memory_order_relaxed); }

void processIdentity(std::uint64_t identity[2]) {
  Process& self = process();
  std::lock_guard lock(self.mutex);
  identity[0] = self.identity[0];
  identity[1] = self.identity[1];
}

namespace {

std::uint64_t hashOf(std::initializer_list<std::string_view> parts) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (std::string_view part : parts) {
    for (const char letter : part) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3;
    hash = (hash ^ 0xff) * 0x100000001b3;
  }
  return hash;
}

std::string bootId() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  if (!std::getline(file, text)) text = shortHostName();
  return text;
}

}  // namespace

std::uint64_t bootIdentity() { return hashOf({bootId()}); }

std::uint64_t domainIdentity(const std::string& hostId) {
  struct stat status {};
  const std::uint64_t network =
      ::stat("/proc/self/ns/net", &status) == 0 ? static_cast<std::uint64_t>(status.st_ino) : 0;
  return hashOf({bootId(), bytesOf(network), hostId});
}

std::uint64_t pidNamespace() {
  struct stat status {};
  return ::stat("/proc/self/ns/pid", &status) == 0 ? static_cast<std::uint64_t>(status.st_ino) : 0;
}

namespace {

void serve(Place* place) {
  try {
    place->lobby->serve(place->stop);
  } catch (const std::exception& error) {
    FUSCO_WARN("the meeting place at init has failed: {}", error.what());
  }
  {
    std::lock_guard guard(process().mutex);
    place->listener.reset();
    place->network.reset();
  }
  place->lobby.reset();
  place->finished.store(true, std::memory_order_release);
}

void start(std::unique_ptr<Place> place) {
  Process& self = process();
  std::lock_guard lock(self.mutex);
  joinFinished(self.places);
  place->thread = startThread("who meets at init", [raw = place.get()] { serve(raw); });
  self.places.push_back(std::move(place));
}

// Listens for other machines, where there is a network; without one a machine of its own can still be served.
UniqueFd listenForOthers(transport::Address* address) {
  if (static_cast<Net>(environment().number(Setting::net)) == Net::sharedMemory) return UniqueFd();
  try {
    *address = transport::usableInterfaces().front().address;
    UniqueFd listener = transport::listenTcp(address, 4096);
    FUSCO_INFO(kLogBootstrap, "ranks of other machines meet at {}", transport::textOf(*address));
    return listener;
  } catch (const Error& error) {
    *address = {};
    FUSCO_INFO(kLogBootstrap, "no meeting place for other machines: {}", error.what());
    return UniqueFd();
  }
}

}  // namespace

UniqueId openMeetingPlace(Lobby::Patience patience) {
  UniqueId id{};
  id.magic = UniqueId::kMagic;
  id.version = UniqueId::kVersion;
  transport::randomBytes(id.key, sizeof(id.key));
  id.domain = domainIdentity(environment().text(Setting::hostId));
  const std::string name = transport::randomName("fusco-meet-");
  std::memcpy(id.socketName, name.c_str(), name.size() + 1);
  auto place = std::make_unique<Place>();
  place->listener = transport::listenAbstract(name, 4096);
  place->network = listenForOthers(&id.address);
  place->id = id;
  place->lobby = std::make_unique<Rendezvous>(id, place->listener.get(), place->network.get(), patience);
  start(std::move(place));
  return id;
}

UniqueId agreeOnMeetingPlace(const std::string& hostAndPort, const std::string& secret, const std::string& job) {
  static constexpr int kFamilies[] = {0, 4, 6};
  UniqueId id{};
  id.magic = UniqueId::kMagic;
  id.version = UniqueId::kVersion;
  id.flags = UniqueId::kByAddress;
  id.address = transport::resolve(hostAndPort, kFamilies[environment().number(Setting::socketFamily)]);
  if (transport::meansOnlyItself(hostAndPort, id.address)) id.flags |= UniqueId::kEverywhere;
  Process& self = process();
  std::lock_guard lock(self.mutex);
  const std::uint32_t count = self.agreements[hostAndPort + '\n' + secret + '\n' + job]++;
  const std::uint8_t none[32] = {};
  const Digest key = keyedDigest(none, {"fusco agreed place", hostAndPort, secret, job, bytesOf(count)});
  std::memcpy(id.key, key.data(), key.size());
  return id;
}

void openAgreedPlace(const UniqueId& id) {
  auto place = std::make_unique<Place>();
  place->id = id;
  transport::Address address = id.address;
  if ((id.flags & UniqueId::kEverywhere) != 0) std::memset(address.bytes, 0, sizeof(address.bytes));
  // The one before may still hold the port: for a moment, or, after a failure, as long as it tells ranks that come
  // late.
  const std::int64_t patienceMs = 2000 + Lobby::Patience{}.lateComersMs;
  for (const Deadline patience = Deadline::afterMs(patienceMs); !place->network; ::poll(nullptr, 0, 20)) {
    try {
      place->network = transport::listenTcp(&address, 4096, true);
    } catch (const Error& error) {
      fail(Code::systemError,
           std::string(error.what()) + ": rank 0 opens the meeting place there, so it has to run on that host");
    }
    if (!place->network && patience.passed()) {
      fail(Code::systemError, "the port of " + transport::textOf(address) +
                                  " is taken, so that rank 0 cannot open the meeting place there; agree on another");
    }
  }
  place->listener = transport::listenAbstract(transport::randomName("fusco-meet-"), 1);
  place->lobby = std::make_unique<Rendezvous>(id, place->listener.get(), place->network.get(), Lobby::Patience{});
  start(std::move(place));
}

void leaveMeetingPlace(const UniqueId& id) {
  Process& self = process();
  // All ranks are answered at about the same time; the thread has only to end.
  const Deadline patience = Deadline::afterMs(1000);
  for (;;) {
    {
      std::lock_guard lock(self.mutex);
      joinFinished(self.places);
      bool running = false;
      for (const auto& place : self.places) running = running || std::memcmp(&place->id, &id, sizeof(id)) == 0;
      if (!running) return;
    }
    if (patience.passed()) return;
    ::poll(nullptr, 0, 1);
  }
}

namespace {

// Whether the rank reaches the meeting place by its Unix socket.
bool isNear(const UniqueId& id, const Record& record) {
  return id.domain == record.domain && (id.flags & UniqueId::kByAddress) == 0;
}

// Connects to the relay of this rank's machine, which the first one opens.
UniqueFd connectRelay(const UniqueId& id, const Record& record, Deadline deadline) {
  if (!id.address) {
    fail(Code::remoteError,
         record.describe() +
             " is on another machine (or in another network namespace, or has another FUSCO_HOSTID) "
             "than the process that made the id, which has no network interface that is up (of those that "
             "FUSCO_SOCKET_IFNAME names, where it is set), or FUSCO_NET=shm");
  }
  const std::string name = Relay::nameFor(id, record.domain);
  for (;;) {
    if (UniqueFd listener = transport::listenAbstractUnlessTaken(name, 4096)) {
      auto place = std::make_unique<Place>();
      place->id = id;
      place->listener = std::move(listener);
      place->lobby = std::make_unique<Relay>(id, place->listener.get(), Lobby::Patience{});
      start(std::move(place));
    }
    UniqueFd socket = transport::connectAbstract(name, deadline);
    if (socket || errno != ECONNREFUSED || deadline.passed()) return socket;
    // The relay of the moment before has just ended.
    ::poll(nullptr, 0, 2);
  }
}

}  // namespace

std::vector<Record> meet(const UniqueId& id, const Record& record, Deadline deadline) {
  passPoint("meet", 0);
  const bool near = isNear(id, record);
  const char* const whose =
      near ? "the process that made the id" : "the process that speaks for the ranks of this machine";
  Hello hello;
  std::memcpy(hello.key, id.key, sizeof(hello.key));
  hello.record = record;
  const unsigned timesStarved = Lobby::timesStarved();
  for (int relaysLost = 0;; ++relaysLost) {
    UniqueFd socket = near ? transport::connectAbstract(id.socketName, deadline) : connectRelay(id, record, deadline);
    if (!socket) {
      if (errno == ECONNREFUSED) failClosed(record);
      failErrno(record.describe() + " cannot reach the meeting place of this id");
    }
    if (!transport::sameUser(socket.get())) {
      fail(Code::systemError, record.describe() + ": the id was made by another user; run all ranks as one user");
    }
    const bool heard = transport::sendMessage(socket.get(), &hello, sizeof(hello)) == transport::Io::done;
    if (!heard && near) failClosed(record);
    if (relaysLost == 0) passPoint("meet", 1);

    const std::optional<Answer> answer =
        heard ? receiveAnswer(socket.get(), record, deadline, whose) : std::optional<Answer>();
    const pid_t host = transport::credentialsOf(socket.get()).pid;
    const bool ownProcess = host == ::getpid();
    if (!answer && ownProcess && Lobby::timesStarved() != timesStarved) {
      fail(Code::systemError, record.describe() +
                                  ": its own process, through which it was to meet the others at init, has no file "
                                  "descriptors left for it; raise `ulimit -n`");
    }
    if (!answer) {
      // A relay is in the process of a rank, and dies with it. Who that was is known when all have met: once more then,
      // through another one.
      if (!near && relaysLost < kMostRelaysLost && !deadline.passed()) {
        ::poll(nullptr, 0, 2);
        continue;
      }
      fail(Code::remoteError,
           record.describe() + ": " + whose + " (pid " + std::to_string(host) + ") ended during init; look at its log");
    }
    // A system error is that of the process at the other end.
    const auto code = static_cast<Code>(answer->head.code);
    if (code != Code::success) {
      throw Error(code == Code::systemError && !ownProcess ? Code::remoteError : code, answer->body);
    }
    std::vector<Record> records(static_cast<std::size_t>(record.ranks));
    if (answer->body.size() != records.size() * sizeof(Record)) {
      fail(Code::internalError,
           record.describe() + " got records of " + std::to_string(answer->body.size()) + " bytes at init");
    }
    std::memcpy(records.data(), answer->body.data(), answer->body.size());
    return records;
  }
}

void tellFailure(const UniqueId& id, const Record& failed, Deadline deadline) {
  try {
    if (isNear(id, failed)) {
      meet(id, failed, deadline);
    } else if (id.address) {
      // A relay takes more descriptors than there may be.
      Relay::bring(id, failed, deadline);
    }
  } catch (const std::exception&) {
    // The answer is that very failure.
  }
}

void agreeOnUniqueId(const std::string& hostAndPort, const std::string& job, char id[128]) {
  const std::string& secret = environment().text(Setting::commKey);
  if (secret.empty()) {
    FUSCO_INFO(kLogBootstrap,
               "the key of the meeting place at {} is made of its address and the job's name: whoever knows both and "
               "reaches the port can take part; FUSCO_COMM_KEY makes it a secret",
               hostAndPort);
  }
  const UniqueId agreed = agreeOnMeetingPlace(hostAndPort, secret, job);
  std::memcpy(id, &agreed, sizeof(agreed));
}

void makeUniqueId(char id[128]) {
  const UniqueId made = openMeetingPlace();
  std::memcpy(id, &made, sizeof(made));
}

}  // namespace fusco::comm
