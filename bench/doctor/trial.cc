// Two processes of this machine shuffle a few rows, over each way that can be tried here. What no list of conditions
// foresees shows up in this.
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <vector>

#include "doctor/report.h"
#include "fusco/fusco.h"

namespace fusco::bench::doctor {

namespace {

constexpr int kRanks = 2, kTokens = 64, kTopk = 2, kExperts = 4;
constexpr std::size_t kHidden = 256;

struct Meeting {
  std::atomic<int> ready;
  fuscoUniqueId id;
};

std::string lastError() { return fuscoGetLastError(nullptr); }

// Every token goes to experts t and t + 1, which send back what they get: the sum is the token, with weights of 1/2.
std::string shuffle(Meeting& meeting, int rank, int node) {
  if (rank == 0) {
    if (fuscoGetUniqueId(&meeting.id) != fuscoSuccess) {
      meeting.ready = -1;
      return lastError();
    }
    meeting.ready = 1;
  }
  while (meeting.ready == 0) usleep(200);
  if (meeting.ready < 0) return "";
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceHost;
  config.nodeId = node;
  config.initTimeoutMs = config.operationTimeoutMs = 10000;
  fuscoComm_t comm = nullptr;
  if (fuscoCommInitRankConfig(&comm, kRanks, meeting.id, rank, &config) != fuscoSuccess) return lastError();
  std::vector<std::int64_t> ids;
  for (int t = 0; t < kTokens; ++t) {
    ids.push_back(t % kExperts);
    ids.push_back((t + 1) % kExperts);
  }
  const std::vector<float> weights(ids.size(), 0.5f);
  std::vector<float> tokens(kTokens * kHidden), sums(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<float>(i * 2 + static_cast<std::size_t>(rank));
  fuscoPlanConfig_t planConfig = FUSCO_PLAN_CONFIG_INIT;
  planConfig.expertIds = ids.data();
  planConfig.weights = weights.data();
  planConfig.tokens = kTokens;
  planConfig.topk = kTopk;
  planConfig.experts = kExperts;
  fuscoPlan_t plan = nullptr;
  if (fuscoPlanCreate(&plan, &planConfig, comm, nullptr) != fuscoSuccess) return lastError();
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  if (fuscoPlanGetInfo(plan, &info) != fuscoSuccess) return lastError();
  std::vector<float> rows(static_cast<std::size_t>(info.receiveRows) * kHidden);
  if (fuscoDispatch(plan, tokens.data(), rows.data(), kHidden * sizeof(float), nullptr) != fuscoSuccess)
    return lastError();
  if (fuscoCombine(plan, rows.data(), sums.data(), kHidden, fuscoFloat32, nullptr) != fuscoSuccess) return lastError();
  if (sums != tokens) return "the sums are wrong";
  fuscoPlanDestroy(plan);
  return fuscoCommDestroy(comm) == fuscoSuccess ? "" : lastError();
}

// "" if both ranks were well.
std::string runTrial(const char* net, bool twoNodes) {
  setenv("FUSCO_NET", net, 1);
  setenv("FUSCO_DEBUG", "NONE", 1);
  void* const memory = mmap(nullptr, sizeof(Meeting), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return "no shared memory";
  auto* const meeting = new (memory) Meeting{};
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  for (int rank = 0; rank < kRanks; ++rank) {
    if (fork() != 0) continue;
    close(ends[0]);
    const std::string text = shuffle(*meeting, rank, twoNodes ? rank : 0);
    const std::string line = text.empty() ? "" : fmt::format("rank {}: {}\n", rank, text);
    _exit(write(ends[1], line.data(), line.size()) < 0 || !text.empty() ? 1 : 0);
  }
  close(ends[1]);
  std::string all;
  char buffer[1024];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;)
    all.append(buffer, static_cast<std::size_t>(got));
  bool well = true;
  for (int status = 0; wait(&status) > 0;) well = well && status == 0;
  if (!all.empty()) return all.substr(0, all.find('\n'));
  return well ? "" : "a rank ended without a word";
}

// `needed`: a run would end there, and not take another way.
void check(Report& report, const std::string& what, const char* net, bool twoNodes, const std::string& mend,
           bool needed = true) {
  const std::string wrong = apart(30, [&] { return runTrial(net, twoNodes); });
  if (wrong.empty()) return report.pass("trial", "two processes shuffle " + what);
  const std::string found = "two processes cannot shuffle " + what + ": " + wrong;
  needed ? report.fail("trial", found, mend) : report.warn("trial", found, mend);
}

}  // namespace

void checkTrials(Report& report) {
  check(report, "in one node's memory", "auto", false,
        "what failed above; FUSCO_DEBUG=INFO FUSCO_DEBUG_SUBSYS=ALL tells more");
  check(report, "between nodes, by shared memory", "shm", true, "what failed above");
  check(report, "between nodes, by TCP on this machine", "tcp", true,
        "let ranks connect to each other on any port; FUSCO_SOCKET_IFNAME names the interface");
  if (!hasActivePort(report)) return;
  check(report, "between nodes, by RDMA on this machine", "verbs", true,
        "what failed above; till then FUSCO_NET=auto takes TCP, and FUSCO_NET=verbs ends there", false);
}

}  // namespace fusco::bench::doctor
