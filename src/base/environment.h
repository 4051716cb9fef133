// The settings that users give by environment variables: one table (environment.cc) makes the code, --help and
// docs/environment.md. They are read once, at the first use of the library, never when it is loaded.
#pragma once

#include <cstdint>
#include <functional>
#include <iosfwd>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fusco {

enum class Setting : int {
  device,
  hostId,
  node,
  debug,
  debugSubsystems,
  debugFile,
  initTimeoutMs,
  operationTimeoutMs,
  sliceBytes,
  slices,
  lanes,
  balance,
  dedup,
  processVm,
  maxStagingBytes,
  maxSms,
  gpuApart,
  p2pDisable,
  hugePages,
  net,
  socketInterfaces,
  socketFamily,
  ibDisable,
  ibHca,
  ibGidIndex,
  ibRoceVersion,
  ibAddressFamily,
  ibAddressRange,
  ibTimeout,
  ibRetryCount,
  ibTrafficClass,
  ibServiceLevel,
  ibPkey,
  ibAdaptiveThreshold,
  ibPlaceRows,
  ibGpuMemory,
  commId,
  commKey,
  // Of libfusco, the NCCL face.
  enable,
  ncclLibrary,
  carry,
  ctaPolicy,
  statistics,
  // Read by the commands tests/run and bench/run, not by the library.
  install,
  buildDirectory,
  gpuArchitectures,
  count
};

enum class SettingType {
  text,
  integer,  // decimal
  bytes,    // decimal, with an optional K, M or G (1024 each)
  flag,     // 0 or 1
  choice,   // one of the names in `choices`, in any case; its value is the name's position
};

struct SettingInfo {
  Setting setting;
  const char* name;  // FUSCO_...
  SettingType type;
  const char* defaultText;   // "" for none
  const char* ncclName;      // read when `name` is not set; "" for none
  std::int64_t least, most;  // of integers and bytes
  const char* choices;       // "a|b|c"
  const char* doc;
  bool ofCommands = false;  // read by tests/run and bench/run
};

// The table, in the order of Setting.
std::span<const SettingInfo> settingTable();

// A number where the variable is not set and the table has no default.
inline constexpr std::int64_t kNotSet = -1;

class Environment {
 public:
  using Variables = std::vector<std::pair<std::string, std::string>>;

  // Pure: what the given variables mean. Names that are not in the table and values that are not understood are told in
  // warnings() and change nothing.
  explicit Environment(const Variables& variables);

  // The value of an integer, bytes, flag or choice.
  std::int64_t number(Setting setting) const { return values_[static_cast<int>(setting)].number; }
  bool flag(Setting setting) const { return number(setting) != 0; }
  const std::string& text(Setting setting) const { return values_[static_cast<int>(setting)].text; }
  // Whether a variable gave it (and was understood).
  bool isSet(Setting setting) const { return values_[static_cast<int>(setting)].isSet; }
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  struct Value {
    std::string text;
    std::int64_t number = kNotSet;
    bool isSet = false;
  };
  std::vector<Value> values_;
  std::vector<std::string> warnings_;
};

// The NAME=value lines of a configuration file of NCCL's; a variable that is there already stays.
void addNcclFile(Environment::Variables& variables, std::istream& file);

// The settings of this process, read by the first call; from any thread. Warnings have been logged.
const Environment& environment();

// The known name that is most like an unknown one, "" if none is near.
std::string nearestName(std::string_view unknown);

// The table as the page docs/environment.md and as text for --help.
std::string environmentMarkdown();
std::string environmentHelp();

}  // namespace fusco
