// Communicators from a launcher's environment and from an agreed address: processes that pass nothing on to each other.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "api/worlds.h"
#include "fusco/fusco.h"
#include "transport/tcp/connect.h"

namespace fusco::test {
namespace {

std::string freeAddress() {
  transport::Address address = transport::resolve("127.0.0.1:1");
  address.port = 0;
  transport::listenTcp(&address, 1);
  return transport::textOf(address);
}

// Each in a process of its own, before the library has read its settings. What they return is their exit status.
std::vector<int> inProcesses(int count, const std::function<int(int)>& body) {
  std::vector<pid_t> children;
  for (int i = 0; i < count; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(30);
      _exit(body(i));
    }
    children.push_back(child);
  }
  std::vector<int> results;
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    results.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status));
  }
  return results;
}

void put(const char* name, const std::string& value) { setenv(name, value.c_str(), 1); }

int useAndLeave(fuscoComm_t comm, int rank, int ranks) {
  int count = 0, own = -1;
  if (fuscoCommCount(comm, &count) != fuscoSuccess || count != ranks) return 2;
  if (fuscoCommUserRank(comm, &own) != fuscoSuccess || own != rank) return 3;
  if (fuscoCommFinalize(comm) != fuscoSuccess) return 4;
  return fuscoCommDestroy(comm) == fuscoSuccess ? 0 : 5;
}

TEST(Launch, InitFromALaunchersEnvironmentTwice) {
  const std::string address = freeAddress();
  const std::size_t colon = address.rfind(':');
  const auto results = inProcesses(3, [&](int rank) {
    put("RANK", std::to_string(rank));
    put("WORLD_SIZE", "3");
    put("MASTER_ADDR", address.substr(0, colon));
    put("MASTER_PORT", std::to_string(std::stoi(address.substr(colon + 1)) - 1));
    put("FUSCO_COMM_KEY", "only for us");
    if (rank == 0) usleep(100000);
    for (int round = 0; round < 2; ++round) {
      fuscoComm_t comm = nullptr;
      if (fuscoCommInitFromEnvironment(&comm, nullptr) != fuscoSuccess) return 1;
      if (const int wrong = useAndLeave(comm, rank, 3); wrong != 0) return wrong;
    }
    return 0;
  });
  EXPECT_EQ(results, std::vector<int>(3, 0));
}

TEST(Launch, AnAgreedAddressReplacesPassingTheIdOn) {
  const std::string address = freeAddress();
  const auto results = inProcesses(4, [&](int rank) {
    put("FUSCO_COMM_ID", address);
    // Two hosts of two.
    put("FUSCO_HOSTID", rank < 2 ? "left" : "right");
    fuscoUniqueId id;
    if (fuscoGetUniqueId(&id) != fuscoSuccess) return 1;
    fuscoComm_t comm = nullptr;
    if (fuscoCommInitRank(&comm, 4, id, rank) != fuscoSuccess) return 2;
    int node = -1;
    if (fuscoCommNode(comm, 3, &node) != fuscoSuccess || node != 1) return 6;
    // A child is made with an id that rank 0 of it makes.
    fuscoComm_t child = nullptr;
    if (fuscoCommSplit(comm, rank % 2, 0, &child, nullptr) != fuscoSuccess) return 7;
    if (const int wrong = useAndLeave(child, rank / 2, 2); wrong != 0) return 10 + wrong;
    return useAndLeave(comm, rank, 4);
  });
  EXPECT_EQ(results, std::vector<int>(4, 0));
}

TEST(Launch, OtherKeysDoNotMeet) {
  const std::string address = freeAddress();
  const auto results = inProcesses(2, [&](int rank) {
    put("FUSCO_COMM_ID", address);
    put("FUSCO_COMM_KEY", rank == 0 ? "one" : "two");
    put("FUSCO_INIT_TIMEOUT_MS", "500");
    put("FUSCO_DEBUG", "NONE");
    fuscoUniqueId id;
    if (fuscoGetUniqueId(&id) != fuscoSuccess) return 1;
    fuscoComm_t comm = nullptr;
    return fuscoCommInitRank(&comm, 2, id, rank) == fuscoRemoteError ? 0 : 2;
  });
  EXPECT_EQ(results, std::vector<int>(2, 0));
}

TEST(Launch, WithoutALauncherItIsInvalidUsage) {
  const auto results = inProcesses(1, [](int) {
    for (const char* name : {"RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"}) unsetenv(name);
    put("FUSCO_DEBUG", "NONE");
    fuscoComm_t comm = nullptr;
    if (fuscoCommInitFromEnvironment(nullptr, nullptr) != fuscoInvalidArgument) return 2;
    if (fuscoCommInitFromEnvironment(&comm, nullptr) != fuscoInvalidUsage) return 1;
    return std::string(fuscoGetLastError(nullptr)).find("torchrun") != std::string::npos ? 0 : 3;
  });
  EXPECT_EQ(results, std::vector<int>(1, 0));
}

}  // namespace
}  // namespace fusco::test
