// Starts ranks and peers, gives them commands, notices when one dies or hangs, and leaves none behind.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "shuffle/options.h"
#include "shuffle/session.h"

namespace fusco::bench {

// A group can go no further: which one, and what happened.
class GroupFailure : public std::runtime_error {
 public:
  GroupFailure(int group, const std::string& what) : std::runtime_error(what), group_(group) {}
  int group() const { return group_; }

 private:
  int group_;
};

// How mpirun (Open MPI) has started this process.
struct Launched {
  bool active = false;
  int rank = 0, ranks = 1;
  std::string job;      // names the meeting file
  std::string problem;  // why these ranks cannot be used; empty: they can
};
Launched launchedByMpirun();
// For ranks that mpirun has started: rank 0 tells the others where the session is. Throws after `seconds`.
void publishSession(const Launched& launched, const std::string& path);
std::string awaitSession(const Launched& launched, int seconds);
void withdrawSession(const Launched& launched);

class Harness {
 public:
  using RankMain = std::function<int(Session& session, int rank)>;

  Harness(Session session, const Options& options);
  ~Harness();
  Harness(const Harness&) = delete;
  Harness& operator=(const Harness&) = delete;

  Session& session() { return session_; }

  // Ranks [first, ranks) as processes or threads of this one. Throws GroupFailure unless all have come.
  void startRanks(const RankMain& rankMain, RankKind kind);
  // Under mpirun: rank 0 as a thread here; the others are processes that have come by themselves.
  void startLaunched(const RankMain& rankMain);
  // The MPI peer program. Returns why there is none; empty: it runs.
  std::string startPeers(const std::string& program);
  const std::string& peerCommand() const { return peerCommand_; }

  // All ranks of the group carry out a step. Throws GroupFailure when one fails, dies or takes too long.
  void order(int group, Step step, std::uint32_t caseIndex, const std::string& impl, int warmup = 0,
             int iterations = 0);
  // Sum of what the last check found.
  std::uint64_t wrong(int group);

  // Ends the group politely, then by force, and reaps it.
  void end(int group);

 private:
  struct Child {
    pid_t pid;
    int group;
    std::string who;
  };

  void awaitJoined(int group, int seconds);
  // Reaps children that have ended; the text of the first, if it should not have.
  std::string someoneDied(int group);
  std::string peerLog();
  void endThreads();

  Session session_;
  const Options& options_;
  std::vector<Child> children_;
  std::vector<std::thread> threads_;
  bool running_[kGroups] = {false, false};
  int peerLog_ = -1;
  std::string peerCommand_;
};

// The program `name` on PATH; empty if there is none.
std::string findOnPath(const std::string& name);
// The folder of the running program.
std::string programFolder();

}  // namespace fusco::bench
