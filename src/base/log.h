// Messages to people, with the levels and subsystems that users of NCCL_DEBUG know. One line each:
//   fusco: host:pid:tid [rank] LEVEL text
// to standard error or to the file of FUSCO_DEBUG_FILE. When a level is off, a message costs one relaxed load and its
// arguments are not evaluated.
#pragma once

#include <fmt/format.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>

namespace fusco {

// In the order of the choices of FUSCO_DEBUG.
enum class LogLevel : std::uint32_t { none = 0, version = 1, warn = 2, info = 3, trace = 4 };

enum LogSubsystem : std::uint32_t {
  kLogInit = 1u << 0,       // communicators come and go
  kLogBootstrap = 1u << 1,  // how ranks meet
  kLogEnv = 1u << 2,        // settings
  kLogPlan = 1u << 3,
  kLogColl = 1u << 4,  // dispatch, combine, all-to-all
  kLogP2p = 1u << 5,   // send and receive
  kLogShm = 1u << 6,   // windows and mapped memory
  kLogNet = 1u << 7,   // links between nodes
  kLogAlloc = 1u << 8,
  kLogTuning = 1u << 9,  // what was chosen and why
  kLogCall = 1u << 10,   // every call of the C API
  kLogAll = ~0u,
};

namespace detail {
// Low half: subsystems; high half: level. kLogUnread until the settings have been read.
inline constexpr std::uint64_t kLogUnread = ~std::uint64_t{0};
extern std::atomic<std::uint64_t> logState;
std::uint64_t readLogState();
void writeLog(LogLevel level, std::string_view text) noexcept;
}  // namespace detail

// Below info the subsystem does not matter.
inline bool logOn(LogLevel level, std::uint32_t subsystem = kLogAll) {
  std::uint64_t state = detail::logState.load(std::memory_order_relaxed);
  if (state == detail::kLogUnread) state = detail::readLogState();
  return static_cast<std::uint32_t>(level) <= state >> 32 &&
         (level < LogLevel::info || (static_cast<std::uint32_t>(state) & subsystem) != 0);
}

#define FUSCO_LOG(level, subsystem, ...)                                                                  \
  do {                                                                                                    \
    try {                                                                                                 \
      if (::fusco::logOn(level, subsystem)) ::fusco::detail::writeLog(level, ::fmt::format(__VA_ARGS__)); \
    } catch (...) { /* out of memory: the message is lost, not the operation */                           \
    }                                                                                                     \
  } while (false)
#define FUSCO_WARN(...) FUSCO_LOG(::fusco::LogLevel::warn, ::fusco::kLogAll, __VA_ARGS__)
#define FUSCO_INFO(subsystem, ...) FUSCO_LOG(::fusco::LogLevel::info, subsystem, __VA_ARGS__)
#define FUSCO_TRACE(subsystem, ...) FUSCO_LOG(::fusco::LogLevel::trace, subsystem, __VA_ARGS__)

// Names the rank in the messages of this thread while it lives.
class LogRank {
 public:
  explicit LogRank(int rank) noexcept;
  ~LogRank();
  LogRank(const LogRank&) = delete;
  LogRank& operator=(const LogRank&) = delete;

 private:
  int previous_;
};

// For tests and for the environment's reader, which calls startLog once.
struct LogSettings {
  LogLevel level = LogLevel::warn;
  std::string subsystems;  // "INIT,NET", "^PLAN" (all but), "" (the default)
  std::string file;        // "" for standard error; %h host, %p process id, %% percent
};
// Opens the file. Returns what was wrong with the settings, as text to be logged.
std::string startLog(const LogSettings& settings);
// Bits for a list of names; unknown ones are appended to `unknown`. Names of NCCL's subsystems that FUSCO has nothing
// to say on are known.
std::uint32_t parseSubsystems(std::string_view list, std::string& unknown);
std::string expandLogFile(std::string_view pattern);
// The host's name, up to the first dot, as log lines have it.
const std::string& shortHostName();

}  // namespace fusco
