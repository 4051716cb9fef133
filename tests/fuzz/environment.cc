// The environment: settings, launchers, lists of names. An input is lines NAME=VALUE.
#include "base/environment.h"

#include <sstream>

#include "base/launcher.h"
#include "base/log.h"
#include "base/status.h"
#include "fuzz/fuzz.h"
#include "transport/tcp/address.h"
#include "transport/verbs/choice.h"

using namespace fusco;

namespace {

void readLists(const std::string& value) {
  std::string unknown;
  parseSubsystems(value, unknown);
  expandLogFile(value);
  transport::Interface one{"eth0", {}, false};
  one.address.family = 4;
  const std::vector<transport::Interface> interfaces(3, one);
  fuzz::require(transport::chooseInterfaces(interfaces, value).size() <= interfaces.size(), "interfaces were invented");
  try {
    const transport::HcaFilter filter(value);
    filter.takes("mlx5_0", 1);
    filter.rankOf("mlx5_0", 1);
  } catch (const Error&) {
    // Refused with a text.
  }
  try {
    transport::GidEntry gid;
    gid.gid[10] = gid.gid[11] = 0xff;
    transport::gidInRange(gid, value);
  } catch (const Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size > 8192) return 0;
  Environment::Variables variables;
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    const std::string_view line = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    const std::size_t equals = line.find('=');
    if (equals == std::string_view::npos) continue;
    variables.emplace_back(line.substr(0, equals), line.substr(equals + 1));
  }
  // The same once more as a file of NCCL's: it gives what is not set yet, of its own names.
  const std::size_t set = variables.size();
  std::istringstream file{std::string(reinterpret_cast<const char*>(data), size)};
  addNcclFile(variables, file);
  for (std::size_t i = set; i < variables.size(); ++i)
    fuzz::require(variables[i].first.starts_with("NCCL_"), "a file set what is not NCCL's");
  const Environment environment(variables);
  fuzz::require(environment.warnings().size() <= 2 * settingTable().size() + variables.size(), "too many warnings");
  for (const SettingInfo& info : settingTable()) {
    if (info.type == SettingType::text || !environment.isSet(info.setting)) continue;
    const std::int64_t number = environment.number(info.setting);
    const bool ranged = info.type == SettingType::integer || info.type == SettingType::bytes;
    fuzz::require(!ranged || (number >= info.least && number <= info.most), "a number out of its range");
  }
  for (const auto& [name, value] : variables) readLists(value);
  try {
    const Launch launch = readLaunch(variables, environment.text(Setting::commId));
    fuzz::require(launch.rank >= 0 && launch.rank < launch.ranks && !launch.address.empty(), "a launch that is none");
  } catch (const Error&) {
    // The variables do not say enough.
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  std::vector<std::string> all = {
      "RANK=1\nWORLD_SIZE=4\nMASTER_ADDR=10.0.0.1\nMASTER_PORT=29500\n",
      "OMPI_COMM_WORLD_RANK=0\nOMPI_COMM_WORLD_SIZE=2\nOMPI_COMM_WORLD_LOCAL_SIZE=2\nOMPI_MCA_ess_base_jobid=77\n",
      "SLURM_PROCID=3\nSLURM_NTASKS=8\nSLURM_JOB_ID=12\nSLURM_STEP_NODELIST=node[007-012,20],gpu1\n",
      "PMIX_RANK=1\nPMIX_SIZE=2\nPMIX_NAMESPACE=job\nFUSCO_COMM_ID=[fd00::1]:4711\n",
      "FUSCO_DEBUG=INFO\nNCCL_DEBUG_SUBSYS=^INIT,NET\nFUSCO_DEBUG_FILE=/tmp/%h.%p\nFUSCO_SLISE_BYTES=1M\n",
      "NCCL_SOCKET_IFNAME==eth0,eth1\nNCCL_IB_HCA=^mlx5_0:1\nNCCL_IB_ADDR_RANGE=10.1.0.0/16\n"};
  std::string everything;
  for (const SettingInfo& info : settingTable()) everything += std::string(info.name) + "=" + info.defaultText + "\n";
  all.push_back(everything);
  return all;
}
