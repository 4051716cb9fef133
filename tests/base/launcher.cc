#include "base/launcher.h"

#include <gtest/gtest.h>

#include "base/status.h"

namespace fusco {
namespace {

TEST(Launcher, TorchrunLeavesItsOwnPortAlone) {
  const Launch launch = readLaunch({{"RANK", "3"},
                                    {"WORLD_SIZE", "16"},
                                    {"MASTER_ADDR", "node1"},
                                    {"MASTER_PORT", "29500"},
                                    {"TORCHELASTIC_RUN_ID", "a"}},
                                   "");
  EXPECT_EQ(launch.rank, 3);
  EXPECT_EQ(launch.ranks, 16);
  EXPECT_EQ(launch.address, "node1:29501");
  EXPECT_EQ(launch.job, "TORCHELASTIC_RUN_ID=a;");
}

TEST(Launcher, AnAddressOfIPv6IsBracketed) {
  const Environment::Variables variables = {
      {"RANK", "0"}, {"WORLD_SIZE", "1"}, {"MASTER_ADDR", "fd00::1"}, {"MASTER_PORT", "65535"}};
  EXPECT_EQ(readLaunch(variables, "").address, "[fd00::1]:65534");
}

TEST(Launcher, TheSettingComesBeforeAll) {
  const Environment::Variables variables = {
      {"RANK", "0"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "node1"}, {"MASTER_PORT", "29500"}};
  EXPECT_EQ(readLaunch(variables, "node2:7").address, "node2:7");
}

TEST(Launcher, MpirunInABatchJobIsMpirun) {
  const Launch launch = readLaunch({{"SLURM_PROCID", "0"},
                                    {"SLURM_NTASKS", "1"},
                                    {"SLURM_JOB_ID", "77"},
                                    {"OMPI_COMM_WORLD_RANK", "2"},
                                    {"OMPI_COMM_WORLD_SIZE", "4"},
                                    {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}},
                                   "");
  EXPECT_EQ(launch.rank, 2);
  EXPECT_EQ(launch.ranks, 4);
  EXPECT_TRUE(launch.address.starts_with("127.0.0.1:")) << launch.address;
}

TEST(Launcher, SlurmStepsMeetOnTheirFirstHost) {
  const auto addressOf = [](const char* hosts) {
    const Launch launch = readLaunch({{"SLURM_PROCID", "5"},
                                      {"SLURM_NTASKS", "8"},
                                      {"SLURM_NNODES", "2"},
                                      {"SLURM_JOB_ID", "77"},
                                      {"SLURM_STEP_NODELIST", hosts}},
                                     "");
    return launch.address.substr(0, launch.address.find(':'));
  };
  EXPECT_EQ(addressOf("node[007-012,20],gpu1"), "node007");
  EXPECT_EQ(addressOf("node[3,5]"), "node3");
  EXPECT_EQ(addressOf("gpu1,node[1-2]"), "gpu1");
  EXPECT_EQ(addressOf("gpu1"), "gpu1");
}

TEST(Launcher, OtherJobsMeetElsewhere) {
  const auto addressOf = [](const char* job) {
    return readLaunch({{"PMIX_RANK", "0"}, {"PMIX_SIZE", "2"}, {"PMIX_LOCAL_SIZE", "2"}, {"PMIX_NAMESPACE", job}}, "")
        .address;
  };
  EXPECT_EQ(addressOf("one"), addressOf("one"));
  EXPECT_NE(addressOf("one"), addressOf("two"));
}

TEST(Launcher, WhatIsMissingIsNamed) {
  const auto errorOf = [](const Environment::Variables& variables) -> std::string {
    try {
      readLaunch(variables, "");
      return "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), Code::invalidUsage);
      return error.what();
    }
  };
  EXPECT_NE(errorOf({}).find("RANK and WORLD_SIZE"), std::string::npos);
  EXPECT_NE(errorOf({{"RANK", "x"}, {"WORLD_SIZE", "2"}}).find("RANK and WORLD_SIZE"), std::string::npos);
  EXPECT_NE(errorOf({{"RANK", "2"}, {"WORLD_SIZE", "2"}}).find("RANK is 2"), std::string::npos);
  EXPECT_NE(errorOf({{"PMIX_RANK", "1"}, {"PMIX_SIZE", "2"}, {"PMIX_NAMESPACE", "a"}}).find("FUSCO_COMM_ID"),
            std::string::npos);
}

}  // namespace
}  // namespace fusco
