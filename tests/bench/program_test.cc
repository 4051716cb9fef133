// shuffle_perf as its users see it.
#include "bench/program.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <fstream>
#include <set>
#include <thread>

#include "bench/json.h"

namespace {

using testing::HasSubstr;
using testing::Not;

const std::string kProgram = SHUFFLE_PERF;
const std::string kQuick = kProgram + " -w 1 -n 2 --rounds 2 --tokens 33 --hidden 500 --timeout 60 ";

Json rowsOf(const std::string& command, int* code = nullptr) {
  std::string file = temporary("rows.json");
  Said said = say(command + " -J " + file);
  if (code != nullptr)
    *code = said.code;
  else
    EXPECT_EQ(said.code, 0) << command << "\n" << said.text;
  Json rows = Json::ofFile(file);
  std::remove(file.c_str());
  EXPECT_TRUE(rows.isArray()) << said.text;
  return rows;
}

std::set<std::string> implsOf(const Json& rows) {
  std::set<std::string> impls;
  for (const Json& row : rows.items()) impls.insert(row["impl"].text());
  return impls;
}

void expectAllRight(const Json& rows, std::size_t atLeast) {
  EXPECT_GE(rows.size(), atLeast);
  for (const Json& row : rows.items()) {
    EXPECT_EQ(row["wrong"].number(), 0) << row.dump();
    EXPECT_GT(row["p50_us"].number(), 0);
    EXPECT_GE(row["p99_us"].number(), 0);
  }
}

TEST(ShufflePerf, Help) {
  Said said = say(kProgram + " --help");
  EXPECT_EQ(said.code, 0);
  EXPECT_THAT(said.text, HasSubstr("--routing"));
  EXPECT_EQ(say(kProgram + " --routing nonsense --impl limit").code, 2);
}

TEST(ShufflePerf, EveryOperationIsRightForEveryImplementation) {
  Json rows = rowsOf(kQuick + "--ranks 2 --op dispatch,combine,alltoallv,gathersend,sendrecv -b 64K -e 64K");
  expectAllRight(rows, 10);  // limit and fusco at least
  std::set<std::string> seen;
  for (const Json& row : rows.items())
    if (row["impl"] == "fusco") seen.insert(row["op"].text());
  EXPECT_EQ(seen.size(), 5u);
}

TEST(ShufflePerf, ThreadsPrivateMemoryNodesOddRanks) {
  for (const char* flags :
       {"--threads --ranks 3", "--memory private --ranks 2", "--ranks 4 --nodes 2",
        "--ranks 3 --experts 7 --topk 3 --dtype float --plan-once", "--ranks 1",
        "--ranks 2 --routing imbalanced --dtype half", "--ranks 2 --dedup full", "--ranks 4 --nodes 2 --dedup none",
        "--ranks 4 --nodes 2 --balance full --routing zipf:1.2"})
    expectAllRight(rowsOf(kQuick + "--impl fusco " + flags), 4);
}

TEST(ShufflePerf, RecordedRouting) {
  std::string data = DATA_FOLDER;
  Json rows = rowsOf(kQuick + "--impl fusco --routing trace:" + data + "/granite-3.0-1b.topk.json");
  expectAllRight(rows, 4);
  EXPECT_EQ(rows[0]["experts"].number(), 32);
  Said said = say(kQuick + "--impl fusco --routing counts:" + data + "/expert-counts.json#OLMoE-1B-7B/c4/0");
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("which experts go together is lost"));
}

TEST(ShufflePerf, JsonHasTheKeysThatOthersRead) {
  Json rows = rowsOf(kQuick + "--impl fusco --op dispatch");
  ASSERT_EQ(rows.size(), 2u);
  for (const Json& row : rows.items())
    for (const char* key :
         {"impl",       "op",         "device",   "ranks",  "nodes",      "tokens",        "hidden",  "dtype",
          "topk",       "experts",    "routing",  "bytes",  "wire_bytes", "p50_us",        "p99_us",  "algbw_gbps",
          "busbw_gbps", "limit_gbps", "of_limit", "wrong",  "plan_us",    "extract_us",    "wire_us", "place_us",
          "sum_us",     "wait_us",    "dedup",    "memory", "balance",    "plan_included", "machine", "versions",
          "command",    "date"})
      EXPECT_TRUE(row.contains(key)) << key;
  EXPECT_EQ(rows[0]["impl"], "limit");
  EXPECT_DOUBLE_EQ(rows[0]["of_limit"].number(), 1.0);
  EXPECT_GT(rows[1]["plan_us"].number(), 0);
  EXPECT_EQ(rows[1]["tokens"].number(), 33);
  EXPECT_THAT(rows[1]["machine"]["cpu"].text(), Not(testing::IsEmpty()));
}

TEST(ShufflePerf, OneSpoiltByteIsFound) {
  for (const char* op : {"dispatch", "combine", "alltoallv"})
    for (const char* impl : {"fusco", "limit-nt"}) {
      int code = 0;
      Json rows = rowsOf(kQuick + "-b 64K -e 64K --impl fusco --op " + op + " --corrupt " + impl, &code);
      EXPECT_EQ(code, 1) << op << " " << impl;
      for (const Json& row : rows.items()) {
        bool spoilt = row["impl"] == (std::string(impl) == "fusco" ? "fusco" : "limit");
        // One element on each of two ranks, checked before and after.
        EXPECT_EQ(row["wrong"].number(), spoilt ? 4 : 0) << row.dump();
      }
    }
}

TEST(ShufflePerf, RowsThatCannotBeWrittenAreAFailure) {
  Said said = say("(" + kQuick + "--impl fusco --op dispatch >/dev/full)");
  EXPECT_EQ(said.code, 2) << said.text;
  EXPECT_THAT(said.text, HasSubstr("could not be written"));
  said = say(kQuick + "--impl fusco --op dispatch -J /nowhere/rows.json");
  EXPECT_EQ(said.code, 2) << said.text;
  EXPECT_THAT(said.text, HasSubstr("cannot write /nowhere/rows.json"));
  EXPECT_THAT(said.text, Not(HasSubstr("dispatch")));  // told before anything is measured
}

TEST(SmallPrograms, EndAsTheOthersDo) {
  for (const std::string program : {PLAN_PERF " --time -n 1 --tokens 16 --ranks 8 --experts 8",
                                    EXEC_PERF " --tokens 8 --rounds 1 --threads 1 --memory private --ops place"}) {
    EXPECT_EQ(say(program + " --nonsense").code, 2) << program;
    EXPECT_EQ(say(program + " --help").code, 0) << program;
    EXPECT_EQ(say(program).code, 0) << program;
    const Said said = say("(" + program + " >/dev/full)");
    EXPECT_EQ(said.code, 2) << said.text;
    EXPECT_THAT(said.text, HasSubstr("could not be written"));
  }
}

TEST(ShufflePerf, MissingPeersAreNamed) {
  Said said = say("PATH=/nowhere " + kQuick + "--op dispatch");
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_THAT(said.text, HasSubstr("missing: mpi-alltoallv: no mpirun on PATH"));
  EXPECT_THAT(said.text, HasSubstr("missing: mpi-alltoallw"));
  EXPECT_THAT(said.text, Not(HasSubstr("missing: mpi-sendrecv")));
  EXPECT_THAT(say(kQuick + "--op dispatch --mpi-peer /nowhere/peer").text, HasSubstr("missing: mpi-alltoallv"));
}

TEST(ShufflePerf, SaysThatNodesAreEmulatedAndCudaIsNotThere) {
  EXPECT_THAT(say(kQuick + "--impl fusco --op dispatch --ranks 2 --nodes 2").text, HasSubstr("2 EMULATED nodes"));
  Said said = say(kQuick + "--device cuda");
  EXPECT_EQ(said.code, 0);
  EXPECT_THAT(said.text, HasSubstr("missing: device cuda"));
}

TEST(ShufflePerf, RunsUnderMpirun) {
  if (say("command -v mpirun").code != 0) GTEST_SKIP() << "no mpirun: apt-get install openmpi-bin";
  std::string root = geteuid() == 0 ? "--allow-run-as-root " : "";
  Json rows = rowsOf("mpirun -np 2 --oversubscribe " + root + kQuick + "--op dispatch");
  expectAllRight(rows, 2);
  EXPECT_EQ(implsOf(rows), (std::set<std::string>{"limit", "fusco"}));
}

// The first child of a process; 0 if it has none yet.
pid_t childOf(pid_t parent) {
  std::ifstream stream("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) + "/children");
  pid_t child = 0;
  stream >> child;
  return child;
}

TEST(ShufflePerf, ARankThatDiesEndsTheRunAtOnce) {
  std::string file = temporary("death.txt");
  pid_t pid = fork();
  if (pid == 0) {
    if (std::freopen(file.c_str(), "w", stdout) == nullptr) _exit(126);
    execl(SHUFFLE_PERF, SHUFFLE_PERF, "--impl", "fusco", "--op", "dispatch", "--tokens", "256", "-n", "1000",
          "--rounds", "1000", static_cast<char*>(nullptr));
    _exit(127);
  }
  pid_t rank = 0;
  for (int i = 0; i < 1000 && rank == 0; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    rank = childOf(pid);
  }
  ASSERT_NE(rank, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  kill(rank, SIGKILL);
  auto begin = std::chrono::steady_clock::now();
  int status = 0;
  ASSERT_EQ(waitpid(pid, &status, 0), pid);
  auto seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_LT(seconds, 15);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 1);
  std::ifstream stream(file);
  std::string text(std::istreambuf_iterator<char>(stream), {});
  EXPECT_THAT(text, HasSubstr("was ended by signal 9"));
  std::remove(file.c_str());
}

}  // namespace
