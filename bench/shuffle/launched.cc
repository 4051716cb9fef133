// Ranks that mpirun has started: shuffle_perf itself never links libmpi, so they meet by a small file.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "shuffle/harness.h"

namespace fusco::bench {
namespace {

std::string meetingFile(const Launched& launched) {
  const char* folder = std::getenv("TMPDIR");
  return fmt::format("{}/shuffle_perf-{}-{}", folder != nullptr ? folder : "/tmp", getuid(), launched.job);
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

}  // namespace

Launched launchedByMpirun() {
  Launched launched;
  std::string rank = variable("OMPI_COMM_WORLD_RANK"), ranks = variable("OMPI_COMM_WORLD_SIZE");
  if (rank.empty() || ranks.empty()) return launched;
  launched.active = true;
  launched.rank = std::atoi(rank.c_str());
  launched.ranks = std::atoi(ranks.c_str());
  if (variable("OMPI_COMM_WORLD_LOCAL_SIZE") != ranks)
    launched.problem = "mpirun has spread the ranks over several machines: this program measures one";
  for (const char* name : {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"})
    if (launched.job.empty()) launched.job = variable(name);
  std::replace_if(
      launched.job.begin(), launched.job.end(), [](unsigned char c) { return !std::isalnum(c); }, '_');
  if (launched.job.empty()) launched.problem = "mpirun has named no job in the environment";
  return launched;
}

void publishSession(const Launched& launched, const std::string& path) {
  std::string file = meetingFile(launched), draft = fmt::format("{}.{}", file, getpid());
  std::ofstream(draft) << path << "\n";
  if (std::rename(draft.c_str(), file.c_str()) != 0) throw std::runtime_error("cannot write " + file);
}

std::string awaitSession(const Launched& launched, int seconds) {
  std::string file = meetingFile(launched);
  for (std::int64_t until = nowNs() + seconds * 1000000000LL; nowNs() < until; usleep(5000)) {
    std::ifstream stream(file);
    std::string path;
    // The session's own file is gone when whoever wrote this has ended: an old note is passed over.
    if (std::getline(stream, path) && access(path.c_str(), R_OK | W_OK) == 0) return path;
  }
  throw std::runtime_error(fmt::format("rank 0 has not opened {} within {} s", file, seconds));
}

void withdrawSession(const Launched& launched) { std::remove(meetingFile(launched).c_str()); }

}  // namespace fusco::bench
