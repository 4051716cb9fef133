#include "shuffle/session.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <thread>

namespace fusco::bench {
namespace {

constexpr std::uint64_t kMagic = 0x66757362656e6368u;
constexpr std::uint64_t kPage = 2 << 20;

std::uint64_t roundUp(std::uint64_t value) { return (value + kPage - 1) / kPage * kPage; }

void futexWait(std::atomic<std::uint32_t>& word, std::uint32_t expected, int ms) {
  timespec time{ms / 1000, (ms % 1000) * 1000000L};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &time, nullptr, 0);
}

void futexWake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

[[noreturn]] void failed(const std::string& what) { throw std::runtime_error(what + ": " + std::strerror(errno)); }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

const char* nameOf(Step step) {
  switch (step) {
    case Step::prepare:
      return "preparing";
    case Step::check:
      return "checking";
    case Step::run:
      return "timing";
    case Step::release:
      return "releasing";
    case Step::quit:
      return "ending";
  }
  return "?";
}

Stages operator-(const Stages& a, const Stages& b) {
  return {a.plan - b.plan, a.extract - b.extract, a.wire - b.wire,          a.place - b.place,
          a.sum - b.sum,   a.wait - b.wait,       a.wireBytes - b.wireBytes};
}

Stages operator+(const Stages& a, const Stages& b) {
  return {a.plan + b.plan, a.extract + b.extract, a.wire + b.wire,          a.place + b.place,
          a.sum + b.sum,   a.wait + b.wait,       a.wireBytes + b.wireBytes};
}

std::int64_t nowNs() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

Session Session::create(const std::vector<std::string>& words, int ranks, int iterations, std::uint64_t windowBytes,
                        std::uint64_t outputBytes) {
  Session session;
  windowBytes = roundUp(windowBytes);
  outputBytes = roundUp(outputBytes);
  auto n = static_cast<std::uint64_t>(ranks);
  std::uint64_t timesOffset = roundUp(sizeof(SessionHeader));
  std::uint64_t timesBytes = sizeof(Span) * kGroups * n * static_cast<std::uint64_t>(iterations);
  std::uint64_t dataOffset = timesOffset + roundUp(timesBytes);
  session.bytes_ = dataOffset + n * (windowBytes + outputBytes);
  session.file_ = memfd_create("shuffle_perf", MFD_CLOEXEC);
  if (session.file_ < 0) failed("memfd_create");
  if (ftruncate(session.file_, static_cast<off_t>(session.bytes_)) != 0) failed("memory for the limit's windows");
  void* at = mmap(nullptr, session.bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, session.file_, 0);
  if (at == MAP_FAILED) failed("mapping the limit's windows");
  madvise(static_cast<std::byte*>(at) + dataOffset, session.bytes_ - dataOffset, MADV_HUGEPAGE);
  session.header_ = static_cast<SessionHeader*>(at);
  session.path_ = "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(session.file_);

  SessionHeader& h = *session.header_;  // a new memory file is all zeros
  h.magic = kMagic;
  h.totalBytes = session.bytes_;
  h.timesOffset = timesOffset;
  h.dataOffset = dataOffset;
  h.windowBytes = windowBytes;
  h.outputBytes = outputBytes;
  h.ranks = static_cast<std::uint32_t>(ranks);
  h.iterations = static_cast<std::uint32_t>(iterations);
  h.coordinator = getpid();
  for (const std::string& word : words) {
    if (h.wordBytes + word.size() + 1 > sizeof h.words) throw std::runtime_error("the command line is too long");
    std::memcpy(h.words + h.wordBytes, word.c_str(), word.size() + 1);
    h.wordBytes += static_cast<std::uint32_t>(word.size() + 1);
  }
  return session;
}

Session Session::attach(const std::string& path) {
  Session session;
  session.file_ = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (session.file_ < 0) failed("opening " + path);
  struct stat status;
  if (fstat(session.file_, &status) != 0) failed(path);
  session.bytes_ = static_cast<std::size_t>(status.st_size);
  if (session.bytes_ < sizeof(SessionHeader)) throw std::runtime_error(path + " is no session of shuffle_perf");
  void* at = mmap(nullptr, session.bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, session.file_, 0);
  if (at == MAP_FAILED) failed("mapping " + path);
  session.header_ = static_cast<SessionHeader*>(at);
  session.path_ = path;
  if (session.header_->magic != kMagic || session.header_->totalBytes != session.bytes_)
    throw std::runtime_error(path + " is no session of this shuffle_perf: build both programs together");
  return session;
}

Session::Session(Session&& other) noexcept
    : header_(other.header_), bytes_(other.bytes_), file_(other.file_), path_(std::move(other.path_)) {
  other.header_ = nullptr;
  other.file_ = -1;
}

Session::~Session() {
  if (header_ != nullptr) munmap(header_, bytes_);
  if (file_ >= 0) close(file_);
}

Span* Session::times(int group, int rank) {
  auto* first = reinterpret_cast<Span*>(reinterpret_cast<std::byte*>(header_) + header_->timesOffset);
  return first +
         (static_cast<std::size_t>(group) * header_->ranks + static_cast<std::size_t>(rank)) * header_->iterations;
}

std::byte* Session::window(int rank) {
  return reinterpret_cast<std::byte*>(header_) + header_->dataOffset +
         static_cast<std::uint64_t>(rank) * header_->windowBytes;
}

std::byte* Session::output(int rank) {
  return reinterpret_cast<std::byte*>(header_) + header_->dataOffset + header_->ranks * header_->windowBytes +
         static_cast<std::uint64_t>(rank) * header_->outputBytes;
}

std::vector<std::string> Session::words() const {
  std::vector<std::string> words;
  for (std::uint32_t at = 0; at < header_->wordBytes; at += static_cast<std::uint32_t>(words.back().size() + 1))
    words.emplace_back(header_->words + at);
  return words;
}

void Session::throwIfAbandoned() {
  if (header_->abandoned.load() != 0) throw Abandoned("the run was given up");
  if (header_->coordinator != getpid() && kill(header_->coordinator, 0) != 0 && errno == ESRCH)
    throw Abandoned("shuffle_perf itself has ended");
}

void Session::meet(int which) {
  GroupState& g = group(which);
  std::uint32_t generation = g.generation.load();
  if (g.arrived.fetch_add(1) + 1 == header_->ranks) {
    g.arrived.store(0);
    g.generation.fetch_add(1);
    futexWake(g.generation);
    return;
  }
  // With a core for every rank, stay awake as long as an iteration may be apart: waking a sleeper on an idle core takes
  // so long that a rank which starts late makes the next one sleep. With fewer cores leave them soon to those who still
  // work.
  static const unsigned cores = std::max(1u, std::thread::hardware_concurrency());
  bool enough = header_->ranks <= cores;
  for (std::int64_t until = nowNs() + (enough ? 20000000 : 200000);
       g.generation.load() == generation && nowNs() < until;) {
    if (!enough) sched_yield();
    for (int i = 0; i < 64 && g.generation.load() == generation; ++i) relax();
  }
  while (g.generation.load() == generation) {
    throwIfAbandoned();
    futexWait(g.generation, generation, 100);
  }
}

std::uint32_t Session::waitForCommand(int which, std::uint32_t seen) {
  GroupState& g = group(which);
  while (g.sequence.load() == seen) {
    throwIfAbandoned();
    futexWait(g.sequence, seen, 200);
  }
  return g.sequence.load();
}

void Session::reportDone(int which) {
  group(which).done.fetch_add(1);
  futexWake(group(which).done);
}

void Session::command(int which, Step step, std::uint32_t caseIndex, const std::string& impl, int warmup,
                      int iterations) {
  GroupState& g = group(which);
  g.step = step;
  g.caseIndex = caseIndex;
  g.warmup = static_cast<std::uint32_t>(warmup);
  g.iterations = static_cast<std::uint32_t>(iterations);
  std::snprintf(g.impl, sizeof g.impl, "%s", impl.c_str());
  for (std::uint32_t r = 0; r < header_->ranks; ++r) {
    g.ranks[r].failed = 0;
    g.ranks[r].wrong = 0;
    g.ranks[r].stages = {};
  }
  g.done.store(0);
  g.sequence.fetch_add(1);
  futexWake(g.sequence);
}

bool Session::waitDone(int which, int ms) {
  GroupState& g = group(which);
  std::int64_t until = nowNs() + ms * 1000000LL;
  for (;;) {
    std::uint32_t done = g.done.load();
    if (done >= header_->ranks) return true;
    auto left = static_cast<int>((until - nowNs()) / 1000000);
    if (left <= 0) return false;
    futexWait(g.done, done, left);
  }
}

void Session::abandon() {
  header_->abandoned.store(1);
  for (GroupState& g : header_->groups) {
    futexWake(g.sequence);
    futexWake(g.generation);
  }
}

}  // namespace fusco::bench
