#include "base/launcher.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string_view>

#include "base/status.h"

namespace fusco {
namespace {

// Of who launched, from the most particular to the most general: a batch system sets its own also for mpirun's
// children.
struct Names {
  const char* launcher;
  const char* rank;
  const char* ranks;
  const char* localRanks;  // ranks of this host
};
constexpr Names kLaunchers[] = {
    {"RANK and WORLD_SIZE", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"},
    {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"},
    {"PMIx", "PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_SIZE"},
    {"PMI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"},
    {"Slurm", "SLURM_PROCID", "SLURM_NTASKS", ""},
};

// Those that are set and tell one job from another.
constexpr const char* kJobNames[] = {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT",
                                     "PMIX_NAMESPACE",      "OMPI_MCA_ess_base_jobid",
                                     "SLURM_JOB_ID",        "SLURM_STEP_ID"};

// Outside of what the kernel gives to clients.
constexpr std::uint32_t kFirstPort = 20000, kPorts = 12000;

class Reader {
 public:
  explicit Reader(const Environment::Variables& variables) : variables_(variables) {}

  std::string text(std::string_view name) const {
    for (const auto& [key, value] : variables_) {
      if (key == name) return value;
    }
    return {};
  }
  int number(std::string_view name) const {
    const std::string value = text(name);
    int number = -1;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    return error == std::errc() && end == value.data() + value.size() ? number : -1;
  }
  std::string job() const {
    std::string all;
    for (const char* name : kJobNames) {
      const std::string value = text(name);
      if (!value.empty()) all += std::string(name) + "=" + value + ";";
    }
    return all;
  }

 private:
  const Environment::Variables& variables_;
};

std::string portOf(std::string_view job) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (const char letter : job) hash = (hash ^ static_cast<unsigned char>(letter)) * 0x100000001b3;
  return std::to_string(kFirstPort + static_cast<std::uint32_t>(hash >> 32) % kPorts);
}

// "node[007-012,20],gpu1" begins with node007.
std::string firstHost(const std::string& list) {
  const std::size_t end = list.find_first_of(",[");
  if (end == std::string::npos || list[end] == ',') return list.substr(0, end);
  const std::size_t last = list.find_first_of(",-]", end + 1);
  return list.substr(0, end) + list.substr(end + 1, last == std::string::npos ? last : last - end - 1);
}

std::string addressOf(const Reader& reader, const Names& names, const Launch& launch) {
  const std::string master = reader.text("MASTER_ADDR");
  const int port = reader.number("MASTER_PORT");
  // The port itself is the launcher's.
  if (!master.empty() && port > 0) {
    const std::string host = master.find(':') == std::string::npos ? master : "[" + master + "]";
    return host + ":" + std::to_string(port < 65535 ? port + 1 : port - 1);
  }
  const bool alone = (names.localRanks[0] != '\0' && reader.number(names.localRanks) == launch.ranks) ||
                     (names.localRanks[0] == '\0' && reader.number("SLURM_NNODES") == 1);
  if (launch.job.empty()) return {};
  if (alone) return "127.0.0.1:" + portOf(launch.job);
  std::string hosts = reader.text("SLURM_STEP_NODELIST");
  if (hosts.empty()) hosts = reader.text("SLURM_JOB_NODELIST");
  return hosts.empty() ? hosts : firstHost(hosts) + ":" + portOf(launch.job);
}

Environment::Variables allVariables() {
  Environment::Variables variables;
  for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) {
    const std::string_view text(*entry);
    const std::size_t equals = text.find('=');
    if (equals != std::string_view::npos) variables.emplace_back(text.substr(0, equals), text.substr(equals + 1));
  }
  return variables;
}

}  // namespace

Launch readLaunch(const Environment::Variables& variables, const std::string& commId) {
  const Reader reader(variables);
  for (const Names& names : kLaunchers) {
    Launch launch{names.launcher, reader.number(names.rank), reader.number(names.ranks), commId, reader.job()};
    if (launch.rank < 0 || launch.ranks < 1) continue;
    if (launch.rank >= launch.ranks) {
      fail(Code::invalidUsage, std::string(names.rank) + " is " + std::to_string(launch.rank) + ", but " + names.ranks +
                                   " is " + std::to_string(launch.ranks));
    }
    if (launch.address.empty()) launch.address = addressOf(reader, names, launch);
    if (launch.address.empty()) {
      fail(Code::invalidUsage, "rank " + std::to_string(launch.rank) + " of " + std::to_string(launch.ranks) + " (by " +
                                   names.launcher +
                                   "): the launcher does not say where rank 0 runs; set FUSCO_COMM_ID=host:port on all "
                                   "ranks, with rank 0's host and a free port, or MASTER_ADDR and MASTER_PORT");
    }
    return launch;
  }
  fail(Code::invalidUsage,
       "no launcher says which rank this process is: set RANK and WORLD_SIZE, or start it by torchrun, mpirun or srun");
}

Launch launchOfProcess() { return readLaunch(allVariables(), environment().text(Setting::commId)); }

std::string launchedJob() { return Reader(allVariables()).job(); }

}  // namespace fusco
