#include "base/environment.h"

#include <fmt/format.h>
#include <strings.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <numeric>
#include <optional>
#include <utility>

#include "base/log.h"

namespace fusco {
namespace {

constexpr std::int64_t kMostMs = INT32_MAX;
constexpr std::int64_t kMostBytes = std::int64_t{1} << 50;
using enum SettingType;

constexpr SettingInfo kTable[] = {
    {Setting::device, "FUSCO_DEVICE", choice, "auto", "", 0, 0, "auto|host|cuda",
     "Where tensors lie: host memory, or memory of the GPU that is the calling thread's when the communicator is made. "
     "auto: the GPU where there is one and FUSCO was built for it, else the host."},
    {Setting::hostId, "FUSCO_HOSTID", text, "", "", 0, 0, "",
     "What tells this host from others, beside the kernel's boot id and the network namespace: ranks with different "
     "values share no memory and reach each other as if they were on different machines. NCCL_HOSTID is not read: it "
     "is "
     "what makes NCCL take several ranks on a GPU, which do share memory."},
    {Setting::node, "FUSCO_NODE", integer, "", "", 0, 1 << 20, "",
     "The node that this process's ranks belong to, for trying several nodes on one host. Default: by host. "
     "Either is divided further where GPUs have no path to each other's memory."},
    {Setting::debug, "FUSCO_DEBUG", choice, "WARN", "NCCL_DEBUG", 0, 0, "NONE|VERSION|WARN|INFO|TRACE",
     "How much is logged."},
    {Setting::debugSubsystems, "FUSCO_DEBUG_SUBSYS", text, "INIT,BOOTSTRAP,ENV", "NCCL_DEBUG_SUBSYS", 0, 0, "",
     "What INFO and TRACE talk about: a list of INIT, BOOTSTRAP, ENV, PLAN, COLL, P2P, SHM, NET, ALLOC, TUNING, CALL, "
     "ALL; "
     "with ^ in front, all but these."},
    {Setting::debugFile, "FUSCO_DEBUG_FILE", text, "", "NCCL_DEBUG_FILE", 0, 0, "",
     "A file for the log; %h is the host, %p the process. Default: standard error."},
    {Setting::initTimeoutMs, "FUSCO_INIT_TIMEOUT_MS", integer, "300000", "", 1, kMostMs, "",
     "All ranks of a communicator must have come within this time."},
    {Setting::operationTimeoutMs, "FUSCO_OPERATION_TIMEOUT_MS", integer, "300000", "", 0, kMostMs, "",
     "An operation that has not finished within this time fails; 0: no limit."},
    {Setting::sliceBytes, "FUSCO_SLICE_BYTES", bytes, "", "", 4096, std::int64_t{1} << 30, "",
     "Size of a slice, the unit of the pipeline between nodes. Default: 1M where ranks compute on GPUs, else 256K."},
    {Setting::slices, "FUSCO_SLICES", integer, "4", "", 1, 1024, "", "Slices in flight for each peer on another node."},
    {Setting::lanes, "FUSCO_LANES", integer, "1", "", 1, 1024, "",
     "Independent ways out of a node (NICs), which the balancer shares out."},
    {Setting::balance, "FUSCO_BALANCE", choice, "none", "", 0, 0, "none|paper|full",
     "How forwarders are chosen: by local index; by the paper's groups; by loads and speeds of lanes, with "
     "spill-over."},
    {Setting::dedup, "FUSCO_DEDUP", choice, "auto", "", 0, 0, "none|node|full|auto",
     "Copies of a token that travel: one for each slot; one for each node; one for each node and rank; auto: node "
     "where the "
     "output can be written directly, else full."},
    {Setting::processVm, "FUSCO_PROCESS_VM", flag, "1", "", 0, 1, "",
     "1: reach private memory of other processes by process_vm_readv and process_vm_writev where the kernel allows it. "
     "0: "
     "through the library's windows."},
    {Setting::maxStagingBytes, "FUSCO_MAX_STAGING_BYTES", bytes, "0", "", 0, kMostBytes, "",
     "Bound on the library's own window for each direction; 0: none."},
    {Setting::maxSms, "FUSCO_MAX_SMS", integer, "0", "NCCL_MAX_CTAS", 0, 1024, "",
     "Multiprocessors of a GPU that a rank's kernels may take; ranks that share a GPU and a process add theirs up. 0: "
     "all."},
    {Setting::gpuApart, "FUSCO_GPU_APART", flag, "0", "", 0, 1, "",
     "1: ranks that share a GPU and a process launch apart, as if each had a GPU of its own: to try on one GPU what "
     "happens on several. It is slower."},
    {Setting::p2pDisable, "FUSCO_P2P_DISABLE", flag, "0", "NCCL_P2P_DISABLE", 0, 1, "",
     "1: GPUs are not to reach each other's memory: ranks on one GPU form a node, the host carries rows between nodes, "
     "and libfusco carries nothing on a GPU. 0: ranks whose GPUs have paths to each other form a node."},
    {Setting::hugePages, "FUSCO_HUGE_PAGES", flag, "1", "", 0, 1, "",
     "1: ask the kernel for huge pages behind windows and workspace; without them work goes on in small ones."},
    {Setting::net, "FUSCO_NET", choice, "auto", "", 0, 0, "auto|tcp|shm|verbs",
     "How ranks of different nodes reach each other. auto: through shared memory where they are on one machine and in "
     "one network namespace, else by RDMA where both have a port for it, else by TCP. tcp: always by TCP. shm: never "
     "by "
     "TCP. verbs: always by RDMA."},
    {Setting::socketInterfaces, "FUSCO_SOCKET_IFNAME", text, "", "NCCL_SOCKET_IFNAME", 0, 0, "",
     "The network interfaces to use: a list of prefixes (eth,ib); with = in front, of whole names; with ^, all but "
     "these. "
     "Ranks meet by the first. Default: the first that is up and no loopback, else loopback."},
    {Setting::socketFamily, "FUSCO_SOCKET_FAMILY", choice, "any", "NCCL_SOCKET_FAMILY", 0, 0, "any|AF_INET|AF_INET6",
     "The addresses to use: IPv4 or IPv6. any: an interface's IPv4 address where it has one."},
    {Setting::ibDisable, "FUSCO_IB_DISABLE", flag, "0", "NCCL_IB_DISABLE", 0, 1, "",
     "1: no RDMA devices are looked for."},
    {Setting::ibHca, "FUSCO_IB_HCA", text, "", "NCCL_IB_HCA", 0, 0, "",
     "The RDMA devices to use, in the order of the lanes: a list of prefixes with an optional port (mlx5_0:1,mlx5_2); "
     "with = in front, of whole names; with ^, all but these. Default: all whose port is active."},
    {Setting::ibGidIndex, "FUSCO_IB_GID_INDEX", integer, "", "NCCL_IB_GID_INDEX", 0, 255, "",
     "The entry of a port's address table (GID) to use. Default: chosen by the three settings below; a routable one "
     "where there is one. The log (INFO, NET) says which, and of which."},
    {Setting::ibRoceVersion, "FUSCO_IB_ROCE_VERSION_NUM", integer, "2", "NCCL_IB_ROCE_VERSION_NUM", 1, 2, "",
     "The version of RoCE to prefer."},
    {Setting::ibAddressFamily, "FUSCO_IB_ADDR_FAMILY", choice, "AF_INET", "NCCL_IB_ADDR_FAMILY", 0, 0,
     "AF_INET|AF_INET6", "The addresses of a RoCE port to prefer: IPv4 or IPv6."},
    {Setting::ibAddressRange, "FUSCO_IB_ADDR_RANGE", text, "", "NCCL_IB_ADDR_RANGE", 0, 0, "",
     "Addresses of a RoCE port outside of this range (10.1.0.0/16, fd00::/8) are not used."},
    {Setting::ibTimeout, "FUSCO_IB_TIMEOUT", integer, "20", "NCCL_IB_TIMEOUT", 1, 31, "",
     "How long a queue pair waits for an acknowledgement before it sends again: 4.1 us times two to the power of "
     "this."},
    {Setting::ibRetryCount, "FUSCO_IB_RETRY_CNT", integer, "7", "NCCL_IB_RETRY_CNT", 0, 7, "",
     "How often a queue pair sends again before it gives up."},
    {Setting::ibTrafficClass, "FUSCO_IB_TC", integer, "0", "NCCL_IB_TC", 0, 255, "",
     "The traffic class of RDMA packets that are routed, as RoCE's always are."},
    {Setting::ibServiceLevel, "FUSCO_IB_SL", integer, "0", "NCCL_IB_SL", 0, 15, "",
     "The service level of RDMA packets."},
    {Setting::ibPkey, "FUSCO_IB_PKEY", integer, "0", "NCCL_IB_PKEY", 0, 65535, "",
     "The entry of a port's table of partition keys to use."},
    {Setting::ibAdaptiveThreshold, "FUSCO_IB_AR_THRESHOLD", bytes, "8192", "NCCL_IB_AR_THRESHOLD", 0, kMostBytes, "",
     "Slices of more bytes are announced by a request of their own, so that adaptive routing may spread them."},
    {Setting::ibPlaceRows, "FUSCO_IB_PLACE_ROWS", flag, "0", "", 0, 1, "",
     "1: rows of 4 KiB and more are written by RDMA to where they belong, each by a request of its own, if all "
     "ranks of the receiver's node have their output in windows; 0: through a ring of slices."},
    {Setting::ibGpuMemory, "FUSCO_IB_GPU_MEMORY", flag, "0", "", 0, 1, "",
     "1: payloads of slices between ranks on GPUs go from GPU memory to GPU memory by RDMA, which is registered "
     "by dmabuf, else by peermem; where neither works, and with 0, by way of pinned host memory. Never tried on a NIC. "
     "The log (INFO, NET) says which."},
    {Setting::commId, "FUSCO_COMM_ID", text, "", "NCCL_COMM_ID", 0, 0, "",
     "host:port where rank 0 opens the meeting place, the same on all ranks: no id has to be passed on then."},
    {Setting::commKey, "FUSCO_COMM_KEY", text, "", "", 0, 0, "",
     "The secret that ranks which meet by FUSCO_COMM_ID or a launcher's variables have in common. Default: none, and "
     "whoever reaches the port and knows the job can take part."},
    {Setting::enable, "FUSCO_ENABLE", flag, "1", "", 0, 1, "",
     "0: libfusco hands every NCCL call to the NCCL that it stands in front of, and does nothing else."},
    {Setting::ncclLibrary, "FUSCO_NCCL_LIB", text, "", "", 0, 0, "",
     "The NCCL that libfusco stands in front of, as a path. Default: the one that the process has loaded, else the one "
     "that the loader finds as libnccl.so.2."},
    {Setting::carry, "FUSCO_CARRY", choice, "mapped", "", 0, 0, "none|mapped|all",
     "Whose point-to-point traffic libfusco takes over from NCCL: nobody's; that of communicators whose ranks can all "
     "reach each other's memory; everybody's."},
    {Setting::ctaPolicy, "FUSCO_CTA_POLICY", text, "", "NCCL_CTA_POLICY", 0, 0, "",
     "NCCL's policy for its blocks on a GPU. 2, or a list with ZERO in it: copies are made without multiprocessors, "
     "and "
     "libfusco carries nothing on a GPU."},
    {Setting::statistics, "FUSCO_STATS", flag, "0", "", 0, 1, "",
     "1: at exit libfusco prints what it carried and what it passed on, for each communicator, and why."},
    {Setting::install, "FUSCO_INSTALL", flag, "1", "", 0, 1, "",
     "0: never install packages, print the line that would and go on with what is there.", true},
    {Setting::buildDirectory, "FUSCO_BUILD_DIR", text, "build", "", 0, 0, "",
     "Where to build; a folder below it for each configuration.", true},
    {Setting::gpuArchitectures, "FUSCO_GPU_ARCHITECTURES", text, "", "", 0, 0, "",
     "What kernels are compiled for, as CMake's CUDA_ARCHITECTURES. Default: this machine's GPUs; without any, 90.",
     true},
};
static_assert(std::size(kTable) == static_cast<std::size_t>(Setting::count));
static_assert([] {
  for (std::size_t i = 0; i < std::size(kTable); ++i) {
    if (kTable[i].setting != static_cast<Setting>(i)) return false;
  }
  return true;
}());

// Prefixes of variables that belong to tests and benchmarks.
constexpr std::string_view kForeign[] = {"FUSCO_TEST_", "FUSCO_BENCH_"};

std::vector<std::string_view> choicesOf(const SettingInfo& info) {
  std::vector<std::string_view> names;
  std::string_view rest = info.choices;
  while (!rest.empty()) {
    const std::size_t bar = std::min(rest.find('|'), rest.size());
    names.push_back(rest.substr(0, bar));
    rest.remove_prefix(std::min(bar + 1, rest.size()));
  }
  return names;
}

std::optional<std::int64_t> parseNumber(const SettingInfo& info, std::string_view value) {
  if (info.type == choice) {
    const auto names = choicesOf(info);
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (names[i].size() == value.size() && strncasecmp(names[i].data(), value.data(), value.size()) == 0) {
        return static_cast<std::int64_t>(i);
      }
    }
    return std::nullopt;
  }
  std::int64_t number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc()) return std::nullopt;
  std::string_view suffix(end, static_cast<std::size_t>(value.data() + value.size() - end));
  if (info.type == bytes && suffix.size() == 1) {
    const std::size_t power = std::string_view("KMG").find(static_cast<char>(toupper(suffix[0])));
    if (power == std::string_view::npos || number > (INT64_MAX >> (10 * (power + 1))) || number < 0)
      return std::nullopt;
    number <<= 10 * (power + 1);
    suffix = {};
  }
  if (!suffix.empty() || number < info.least || number > info.most) return std::nullopt;
  return number;
}

std::string rangeOf(const SettingInfo& info) {
  switch (info.type) {
    case choice: {
      std::string names = info.choices;
      std::replace(names.begin(), names.end(), '|', ' ');
      return "one of " + names;
    }
    case flag:
      return "0 or 1";
    case integer:
      return fmt::format("a number from {} to {}", info.least, info.most);
    case bytes:
      return fmt::format("bytes from {} to {}, K, M and G allowed", info.least, info.most);
    case text:
      break;
  }
  return "text";
}

std::size_t editDistance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t change = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({change, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

Environment::Variables processVariables() {
  Environment::Variables variables;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::size_t equals = text.find('=');
    if (equals == std::string_view::npos || (!text.starts_with("FUSCO_") && !text.starts_with("NCCL_"))) continue;
    variables.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return variables;
}

// NCCL's order: what is set, then the user's file, then the system's.
void addNcclFiles(Environment::Variables& variables) {
  std::string users;
  if (const char* named = ::getenv("NCCL_CONF_FILE"); named != nullptr && named[0] != 0) {
    users = named;
  } else if (const char* home = ::getenv("HOME")) {
    users = std::string(home) + "/.nccl.conf";
  }
  for (const std::string& path : {users, std::string("/etc/nccl.conf")}) {
    std::ifstream file(path);
    if (file) addNcclFile(variables, file);
  }
}

}  // namespace

void addNcclFile(Environment::Variables& variables, std::istream& file) {
  for (std::string line; std::getline(file, line);) {
    const std::size_t equals = line.find('=');
    if (!line.starts_with("NCCL_") || equals == std::string::npos) continue;
    const std::string name = line.substr(0, equals);
    std::string value = line.substr(equals + 1);
    value.erase(value.find_last_not_of(" \t\r") + 1);
    if (std::none_of(variables.begin(), variables.end(), [&](const auto& known) { return known.first == name; }))
      variables.emplace_back(name, value);
  }
}

std::span<const SettingInfo> settingTable() { return kTable; }

std::string nearestName(std::string_view unknown) {
  std::string nearest;
  std::size_t least = std::max<std::size_t>(2, (unknown.size() - std::min<std::size_t>(unknown.size(), 6)) / 3) + 1;
  for (const SettingInfo& info : kTable) {
    const std::size_t distance = editDistance(unknown, info.name);
    if (distance < least) {
      least = distance;
      nearest = info.name;
    }
  }
  return nearest;
}

Environment::Environment(const Variables& variables) : values_(std::size(kTable)) {
  const auto find = [&](std::string_view name) -> const std::string* {
    for (const auto& [key, value] : variables) {
      if (key == name) return &value;
    }
    return nullptr;
  };
  for (const SettingInfo& info : kTable) {
    Value& value = values_[static_cast<int>(info.setting)];
    value.text = info.defaultText;
    if (info.type != SettingType::text && !value.text.empty()) value.number = parseNumber(info, value.text).value();
    const char* source = info.name;
    const std::string* given = find(info.name);
    if (given == nullptr && info.ncclName[0] != '\0') given = find(source = info.ncclName);
    if (given == nullptr || given->empty()) continue;
    if (info.type != SettingType::text) {
      const std::optional<std::int64_t> number = parseNumber(info, *given);
      if (!number) {
        warnings_.push_back(fmt::format("{}={}: needs {}; {} is used", source, *given, rangeOf(info),
                                        value.text.empty() ? "the default" : value.text));
        continue;
      }
      value.number = *number;
    }
    value.text = *given;
    value.isSet = true;
  }
  for (const auto& variable : variables) {
    const std::string& name = variable.first;
    if (!name.starts_with("FUSCO_")) continue;
    const auto has = [&](const SettingInfo& info) { return name == info.name; };
    const auto begins = [&](std::string_view prefix) { return name.starts_with(prefix); };
    if (std::any_of(std::begin(kTable), std::end(kTable), has)) continue;
    if (std::any_of(std::begin(kForeign), std::end(kForeign), begins)) continue;
    const std::string nearest = nearestName(name);
    warnings_.push_back(
        fmt::format("{}: no such setting{}", name, nearest.empty() ? "" : "; is " + nearest + " meant?"));
  }
}

const Environment& environment() {
  static const Environment* const settings = [] {
    // Never freed: threads may log while the process ends.
    Environment::Variables variables = processVariables();
    addNcclFiles(variables);
    static const Environment& read = *new Environment(variables);
    const std::string wrong = startLog({static_cast<LogLevel>(read.number(Setting::debug)),
                                        read.text(Setting::debugSubsystems), read.text(Setting::debugFile)});
    for (const std::string& warning : read.warnings()) FUSCO_WARN("{}", warning);
    if (!wrong.empty()) FUSCO_WARN("{}", wrong);
    for (const SettingInfo& info : kTable) {
      const bool secret = info.setting == Setting::commKey;
      if (read.isSet(info.setting)) {
        FUSCO_INFO(kLogEnv, "{} is {}", info.name, secret ? "set" : read.text(info.setting));
      }
    }
    return &read;
  }();
  return *settings;
}

std::string environmentMarkdown() {
  std::string page =
      "# Which settings are there?\n\n"
      "A setting is read from its `FUSCO_` variable, else from the NCCL variable beside it (that is set, or stands in\n"
      "NCCL's files: that of `NCCL_CONF_FILE` or `~/.nccl.conf`, then `/etc/nccl.conf`), else it has its default. "
      "Values\n"
      "that a program gives in `fuscoConfig_t` come before all of these. They are read once, at the first use of the\n"
      "library. An unknown `FUSCO_` name or a value that is not understood is told in one warning and changes "
      "nothing;\n"
      "names that begin with `FUSCO_TEST_` or `FUSCO_BENCH_` belong to tests and benchmarks.\n\n"
      "This page is made from the table in `src/base/environment.cc`: `cmake --build <folder> --target "
      "environment_page`.\n";
  for (const bool ofCommands : {false, true}) {
    page += ofCommands ? "\n## Of the commands `tests/run` and `bench/run`\n\n" : "\n## Of the library\n\n";
    page += "| setting | or | value | default | meaning |\n|---|---|---|---|---|\n";
    for (const SettingInfo& info : kTable) {
      if (info.ofCommands != ofCommands) continue;
      const auto code = [](std::string_view s) { return s.empty() ? std::string() : fmt::format("`{}`", s); };
      page += fmt::format("| `{}` | {} | {} | {} | {} |\n", info.name, code(info.ncclName), rangeOf(info),
                          code(info.defaultText), info.doc);
    }
  }
  return page;
}

std::string environmentHelp() {
  std::string help = "Settings (environment variables):\n";
  for (const SettingInfo& info : kTable) {
    if (info.ofCommands) continue;
    help += fmt::format("  {}{}{}: {}{}{}\n      {}\n", info.name, info.ncclName[0] ? ", else " : "", info.ncclName,
                        rangeOf(info), info.defaultText[0] ? "; default " : "", info.defaultText, info.doc);
  }
  return help;
}

}  // namespace fusco
