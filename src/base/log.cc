#include "base/log.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "base/environment.h"

namespace fusco {
namespace {

struct SubsystemName {
  std::string_view name;
  std::uint32_t bits;
};
constexpr SubsystemName kSubsystems[] = {
    {"INIT", kLogInit},   {"BOOTSTRAP", kLogBootstrap},
    {"ENV", kLogEnv},     {"PLAN", kLogPlan},
    {"COLL", kLogColl},   {"P2P", kLogP2p},
    {"SHM", kLogShm},     {"NET", kLogNet},
    {"ALLOC", kLogAlloc}, {"TUNING", kLogTuning},
    {"CALL", kLogCall},   {"ALL", kLogAll},
    {"GRAPH", 0},         {"PROXY", 0},
    {"NVLS", 0},          {"REG", 0},
    {"PROFILE", 0},       {"RAS", 0},
};
constexpr std::uint32_t kDefaultSubsystems = kLogInit | kLogBootstrap | kLogEnv;
constexpr std::array<std::string_view, 5> kLevelNames = {"NONE", "VERSION", "WARN", "INFO", "TRACE"};

std::atomic<int> logFile{STDERR_FILENO};
thread_local int logRank = -1;

bool sameName(std::string_view a, std::string_view b) {
  return a.size() == b.size() && strncasecmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace

namespace detail {

std::atomic<std::uint64_t> logState{kLogUnread};

std::uint64_t readLogState() {
  environment();  // starts the log
  return logState.load(std::memory_order_relaxed);
}

void writeLog(LogLevel level, std::string_view text) noexcept try {
  std::string line = fmt::format("fusco: {}:{}:{} ", shortHostName(), getpid(), syscall(SYS_gettid));
  if (logRank >= 0) line += fmt::format("[{}] ", logRank);
  line += fmt::format("{} {}\n", kLevelNames[static_cast<std::uint32_t>(level)], text);
  // One write, so that lines of several threads and processes do not mix.
  const char* at = line.data();
  std::size_t left = line.size();
  while (left > 0) {
    const ssize_t written = write(logFile.load(std::memory_order_relaxed), at, left);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    at += written;
    left -= static_cast<std::size_t>(written);
  }
} catch (...) {
  // Out of memory: the message is lost, not the operation.
}

}  // namespace detail

LogRank::LogRank(int rank) noexcept : previous_(logRank) { logRank = rank; }
LogRank::~LogRank() { logRank = previous_; }

const std::string& shortHostName() {
  static const std::string name = [] {
    char buffer[256] = {};
    if (gethostname(buffer, sizeof buffer - 1) != 0) return std::string("localhost");
    return std::string(buffer, strcspn(buffer, "."));
  }();
  return name;
}

std::uint32_t parseSubsystems(std::string_view list, std::string& unknown) {
  if (list.empty()) return kDefaultSubsystems;
  const bool allBut = list.front() == '^';
  if (allBut) list.remove_prefix(1);
  std::uint32_t bits = 0;
  while (!list.empty()) {
    const std::size_t comma = list.find(',');
    const std::string_view name = list.substr(0, comma);
    list = comma == std::string_view::npos ? std::string_view() : list.substr(comma + 1);
    bool known = name.empty();
    for (const SubsystemName& subsystem : kSubsystems) {
      if (!sameName(subsystem.name, name)) continue;
      bits |= subsystem.bits;
      known = true;
    }
    if (!known) unknown += (unknown.empty() ? "" : ",") + std::string(name);
  }
  return allBut ? ~bits : bits;
}

std::string expandLogFile(std::string_view pattern) {
  std::string path;
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    const char next = pattern[i] == '%' && i + 1 < pattern.size() ? pattern[i + 1] : '\0';
    if (next == 'h')
      path += shortHostName();
    else if (next == 'p')
      path += std::to_string(getpid());
    else if (next == '%')
      path += '%';
    else {
      path += pattern[i];
      continue;
    }
    ++i;
  }
  return path;
}

std::string startLog(const LogSettings& settings) {
  std::string wrong, unknown;
  const std::uint32_t bits = parseSubsystems(settings.subsystems, unknown);
  if (!unknown.empty()) wrong = "FUSCO_DEBUG_SUBSYS: no subsystem " + unknown;
  int fd = STDERR_FILENO;
  if (!settings.file.empty() && settings.level != LogLevel::none) {
    const std::string path = expandLogFile(settings.file);
    fd = open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) {
      wrong += (wrong.empty() ? "" : "; ") + ("FUSCO_DEBUG_FILE: " + path + ": " + std::strerror(errno)) +
               "; messages go to standard error";
      fd = STDERR_FILENO;
    }
  }
  const int old = logFile.exchange(fd);
  if (old != STDERR_FILENO) close(old);
  detail::logState.store(static_cast<std::uint64_t>(settings.level) << 32 | bits, std::memory_order_relaxed);
  return wrong;
}

}  // namespace fusco
