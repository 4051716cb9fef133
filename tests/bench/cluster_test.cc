// Emulated clusters: what they are made of, that shuffles run in them, and that nothing of them stays.
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "bench/program.h"

namespace {

constexpr int kCannot = 77;

Said cluster(const std::string& words) { return say(std::string(CLUSTER) + " " + words); }

std::string namespaces() { return say("ip netns list | grep -E '^fusco[0-9]+n' || true").text; }

#define SKIP_WITHOUT_RIGHT(said) \
  if (said.code == kCannot) GTEST_SKIP() << said.text

TEST(Cluster, ShufflesAreRightAndSayWhatTheyRanOn) {
  const Said said = cluster(std::string("--nodes 2 --ranks-per-node 2 --lanes 2 --rate 400mbit --timeout 90 -- ") +
                            SHUFFLE_PERF + " --tokens 32 --hidden 1024 --impl fusco --rounds 1 -n 2 -w 1 --timeout 60");
  SKIP_WITHOUT_RIGHT(said);
  EXPECT_EQ(said.code, 0) << said.text;
  EXPECT_NE(said.text.find("rows, 0 with wrong elements: OK"), std::string::npos) << said.text;
  EXPECT_NE(
      said.text.find("# EMULATED cluster: 2 nodes as network namespaces x 2 ranks, 2 lane(s) a node, each held to "
                     "400mbit"),
      std::string::npos)
      << said.text;
  EXPECT_NE(said.text.find("# bytes out by node:lane"), std::string::npos) << said.text;
}

// What goes by a lane is held to its rate, and stays off the others.
TEST(Cluster, LanesAreHeldToTheirRate) {
  const std::string script = temporary("lanes.sh");
  std::ofstream(script) << "ip netns exec ${CLUSTER_NETNS}1 python3 -c \"\n"
                           "import socket\n"
                           "s = socket.socket(); s.bind(('10.78.0.2', 5000)); s.listen(1); s.settimeout(20)\n"
                           "c, a = s.accept()\n"
                           "while c.recv(1 << 20): pass\n"
                           "c.sendall(b'x')\" &\n"
                           "ip netns exec ${CLUSTER_NETNS}0 python3 -c \"\n"
                           "import socket, time\n"
                           "for attempt in range(200):\n"
                           "  s = socket.socket(); s.settimeout(20); s.bind(('10.78.0.1', 0))\n"
                           "  try: s.connect(('10.78.0.2', 5000)); break\n"
                           "  except OSError: time.sleep(0.05)\n"
                           "begin = time.time(); s.sendall(b'x' * 10000000); s.shutdown(1); s.recv(1)\n"
                           "print('rate', 80 / (time.time() - begin))\"\n"
                           "wait\n";
  const Said said = cluster("--nodes 2 --lanes 2 --rate 100mbit --timeout 60 -- bash " + script);
  std::remove(script.c_str());
  SKIP_WITHOUT_RIGHT(said);
  ASSERT_EQ(said.code, 0) << said.text;
  const std::size_t at = said.text.find("rate ");
  ASSERT_NE(at, std::string::npos) << said.text;
  const double mbit = std::stod(said.text.substr(at + 5));
  EXPECT_LT(mbit, 125) << said.text;
  EXPECT_GT(mbit, 50) << said.text;
  EXPECT_NE(said.text.find("0:1 10"), std::string::npos) << "by lane 1 of node 0 went 10 MB: " << said.text;
}

TEST(Cluster, NothingStaysWhenItIsEnded) {
  const Said made = cluster("--nodes 1 -- true");
  SKIP_WITHOUT_RIGHT(made);
  EXPECT_EQ(made.code, 0) << made.text;
  const std::string note = temporary("cluster");
  const Said ended = say(std::string(CLUSTER) + " --nodes 2 -- sh -c 'echo $CLUSTER_NETNS > " + note +
                         "; sleep 60' & child=$!; for i in $(seq 1200); do [ -s " + note +
                         " ] && break; sleep 0.05; done; kill -TERM $child; wait $child; echo ended $?");
  EXPECT_NE(ended.text.find("ended 143"), std::string::npos) << ended.text;
  std::string prefix;
  std::ifstream(note) >> prefix;
  std::remove(note.c_str());
  ASSERT_FALSE(prefix.empty());
  EXPECT_EQ(namespaces().find(prefix), std::string::npos) << namespaces();
  EXPECT_EQ(cluster("--nodes 1 -- false").code, 1);
}

// 77 is for machines where there can be no cluster.
TEST(Cluster, WhatIsWrongInItsCommandIsSaid) {
  for (const char* words : {"--rate quick -- true", "--slow 9:0:5mbit:1 -- true", "--slow 0:1:5mbit:1 -- true",
                            "--slow 0:0:quick:1 -- true", "--nodes 0 -- true", "-- /nowhere/program"}) {
    const Said said = cluster(words);
    EXPECT_EQ(said.code, 2) << words << said.text;
    EXPECT_NE(said.text.find("cluster: error: "), std::string::npos) << said.text;
  }
}

TEST(Cluster, NothingStaysWhenItIsKilled) {
  const Said made = cluster("--nodes 1 -- true");
  SKIP_WITHOUT_RIGHT(made);
  const std::string note = temporary("killed");
  say(std::string(CLUSTER) + " --nodes 2 -- sh -c 'echo $CLUSTER_NETNS > " + note +
      "; exec sleep 60' & child=$!; for i in $(seq 1200); do [ -s " + note +
      " ] && break; sleep 0.05; done; kill -KILL $child; wait $child");
  std::string prefix;
  std::ifstream(note) >> prefix;
  std::remove(note.c_str());
  ASSERT_FALSE(prefix.empty());
  for (int i = 0; i < 600 && namespaces().find(prefix) != std::string::npos; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  EXPECT_EQ(namespaces().find(prefix), std::string::npos) << namespaces();
}

}  // namespace
