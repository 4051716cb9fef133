// plan_perf: the time that planning takes, what the exchange costs by formula, and how even the balancer makes the
// lanes.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>
#include <vector>

#include "bench/printed.h"
#include "exchange_cost.h"
#include "lanes.h"
#include "planning_time.h"

namespace {

using namespace fusco;
using Json = nlohmann::ordered_json;

struct Arguments {
  std::vector<std::int64_t> tokens = {256, 1024, 4096, 16384};
  std::vector<int> ranks = {8, 64, 512, 2048};
  std::vector<int> experts = {64, 256, 2048};
  bench::PlanQuestion base;
  std::string json;
  bool balance = false;
  bool exchange = false;
  bool time = false;
  bench::LaneQuestion lanes;
  std::vector<std::string> routing = {"imbalanced", "zipf:1.2"};
};

std::string cpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

// Around the base each of tokens, ranks and experts grows alone; then ranks and experts together.
std::vector<std::pair<const char*, bench::PlanQuestion>> sweep(const Arguments& arguments) {
  std::vector<std::pair<const char*, bench::PlanQuestion>> questions;
  for (const auto tokens : arguments.tokens) {
    questions.emplace_back("tokens", arguments.base).second.tokens = tokens;
  }
  for (const int ranks : arguments.ranks) {
    questions.emplace_back("ranks", arguments.base).second.ranks = ranks;
  }
  for (const int experts : arguments.experts) {
    questions.emplace_back("experts", arguments.base).second.experts = experts;
  }
  const int most = *std::max_element(arguments.ranks.begin(), arguments.ranks.end());
  auto& largest = questions.emplace_back("largest", arguments.base).second;
  largest.ranks = most;
  largest.experts = std::max(most, *std::max_element(arguments.experts.begin(), arguments.experts.end()));
  return questions;
}

std::int64_t showTimes(const Arguments& arguments, Json& rows) {
  std::int64_t wrong = 0;
  fmt::print("# planning one rank's part on one core, the exchange apart: analysis with validation, then both hops\n");
  if (arguments.base.masked > 0) fmt::print("# {:g} of the slots hold -1\n", arguments.base.masked);
  fmt::print("# {:>8} {:>8} {:>6} {:>6} {:>8} {:>5} {:>10} {:>9} {:>9} {:>9} {:>7} {:>6}\n", "sweep", "tokens", "ranks",
             "nodes", "experts", "topk", "analyse_us", "plan_us", "p50_us", "p99_us", "ns/slot", "#wrong");
  for (const auto& [name, question] : sweep(arguments)) {
    const bench::PlanTime time = bench::timePlanning(question);
    const int nodes = (question.ranks + question.nodeSize - 1) / question.nodeSize;
    const double slots = static_cast<double>(question.tokens) * question.topk;
    fmt::print("  {:>8} {:>8} {:>6} {:>6} {:>8} {:>5} {:>10.1f} {:>9.1f} {:>9.1f} {:>9.1f} {:>7.2f} {:>6}\n", name,
               question.tokens, question.ranks, nodes, question.experts, question.topk, time.analyseP50, time.planP50,
               time.p50, time.p99, slots > 0 ? time.p50 * 1000 / slots : 0, time.wrong);
    rows.push_back({{"kind", "planning"},
                    {"sweep", name},
                    {"tokens", question.tokens},
                    {"topk", question.topk},
                    {"ranks", question.ranks},
                    {"nodes", nodes},
                    {"experts", question.experts},
                    {"masked", question.masked},
                    {"id_bytes", question.idBytes},
                    {"analyse_us", time.analyseP50},
                    {"plan_us", time.planP50},
                    {"p50_us", time.p50},
                    {"p99_us", time.p99},
                    {"copies", time.copies},
                    {"entries", time.entries},
                    {"arena_bytes", time.arenaBytes},
                    {"wrong", time.wrong}});
    wrong += time.wrong;
  }
  return wrong;
}

void showExchange(const Arguments& arguments, Json& rows) {
  fmt::print("# exchange between analysis and plan, each rank, by formula (bytes)\n");
  fmt::print("# {:>6} {:>6} {:>6} {:>7} {:>12} {:>10} {:>10} {:>12}\n", "ranks", "nodes", "keys", "rounds",
             "sent_across", "published", "read", "full_matrix");
  for (int ranks = 8; ranks <= 2048; ranks *= 2) {
    const int size = std::min(ranks, arguments.base.nodeSize);
    const int nodes = (ranks + size - 1) / size;
    const int smallest = ranks - (nodes - 1) * size;
    const int keys = std::max(arguments.base.experts, ranks);
    const bench::ExchangeCost cost = bench::exchangeCost(ranks, nodes, smallest, keys);
    fmt::print("  {:>6} {:>6} {:>6} {:>7} {:>12} {:>10} {:>10} {:>12}\n", ranks, nodes, keys, cost.rounds,
               cost.sentAcross, cost.publishedInNode, cost.readInNode, cost.matrix);
    rows.push_back({{"kind", "exchange"},
                    {"ranks", ranks},
                    {"nodes", nodes},
                    {"keys", keys},
                    {"rounds", cost.rounds},
                    {"sent_across_bytes", cost.sentAcross},
                    {"published_in_node_bytes", cost.publishedInNode},
                    {"read_in_node_bytes", cost.readInNode},
                    {"full_matrix_bytes", cost.matrix}});
  }
}

void showBalance(const Arguments& arguments, Json& rows) {
  bench::LaneQuestion question = arguments.lanes;
  question.tokens = arguments.base.tokens;
  question.topk = arguments.base.topk;
  question.experts = arguments.base.experts;
  fmt::print(
      "# busiest lane over the mean of its own node's lanes, and over the mean of all lanes: {} nodes x {} ranks, {} "
      "lanes "
      "a node, {} tokens a rank, top-{} of {}; loads of one step, plans of the next\n",
      question.nodes, question.nodeSize, question.lanes, question.tokens, question.topk, question.experts);
  fmt::print("# {:>12} {:>8} {:>8} {:>8} {:>11} {:>11} {:>10} {:>7}\n", "routing", "balance", "out", "in",
             "cluster_out", "cluster_in", "copies", "flows");
  for (const std::string& routing : arguments.routing) {
    question.routing = routing;
    for (const plan::Balance balance : {plan::Balance::none, plan::Balance::paper, plan::Balance::full}) {
      const bench::LaneAnswer answer = bench::measureLanes(question, balance);
      fmt::print("  {:>12} {:>8} {:>8.3f} {:>8.3f} {:>11.3f} {:>11.3f} {:>10} {:>7}\n", routing,
                 plan::balanceName(balance), answer.spread.out, answer.spread.in, answer.spread.clusterOut,
                 answer.spread.clusterIn, answer.copies, answer.flows);
      rows.push_back({{"kind", "balance"},
                      {"routing", routing},
                      {"balance", plan::balanceName(balance)},
                      {"nodes", question.nodes},
                      {"node_size", question.nodeSize},
                      {"lanes", question.lanes},
                      {"out", answer.spread.out},
                      {"in", answer.spread.in},
                      {"cluster_out", answer.spread.clusterOut},
                      {"cluster_in", answer.spread.clusterIn},
                      {"copies", answer.copies},
                      {"flows", answer.flows}});
    }
  }
}

int run(const Arguments& arguments, const std::string& command) {
  const bool all = !arguments.time && !arguments.exchange && !arguments.balance;
  const std::string machine = fmt::format("{}, {} cores", cpuName(), std::thread::hardware_concurrency());
  fmt::print("# plan_perf on {}\n", machine);
  Json rows = Json::array();
  std::int64_t wrong = 0;
  if (all || arguments.time) wrong = showTimes(arguments, rows);
  if (all || arguments.exchange) showExchange(arguments, rows);
  if (all || arguments.balance) showBalance(arguments, rows);
  if (!arguments.json.empty()) {
    for (Json& row : rows) row.update({{"machine", machine}, {"compiler", __VERSION__}, {"command", command}});
    std::ofstream file(arguments.json);
    if (!(file << rows.dump(1) << '\n').flush()) {
      fmt::print(stderr, "plan_perf: {} cannot be written\n", arguments.json);
      return 1;
    }
  }
  if (wrong != 0) fmt::print(stderr, "plan_perf: {} entries are wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app(
      "Time of planning, cost of its exchange, balance of lanes. Without --time, --exchange or --balance: all three.");
  app.add_flag("--time", arguments.time, "planning time over tokens, ranks and experts");
  app.add_flag("--exchange", arguments.exchange, "rounds and bytes of the exchange, by formula");
  app.add_flag("--balance", arguments.balance, "busiest lane: none, paper and full side by side");
  app.add_option("--tokens", arguments.tokens, "sweep of tokens a rank")->delimiter(',')->check(CLI::NonNegativeNumber);
  app.add_option("--ranks", arguments.ranks, "sweep of ranks")->delimiter(',')->check(CLI::Range(1, 1 << 16));
  app.add_option("--experts", arguments.experts, "sweep of experts")->delimiter(',')->check(CLI::Range(1, 1 << 20));
  app.add_option("--base-tokens", arguments.base.tokens, "tokens a rank where another thing is swept")
      ->capture_default_str();
  app.add_option("--base-ranks", arguments.base.ranks, "ranks where another thing is swept")->capture_default_str();
  app.add_option("--base-experts", arguments.base.experts, "experts where another thing is swept")
      ->capture_default_str();
  app.add_option("--topk", arguments.base.topk, "experts of a token")->capture_default_str();
  app.add_option("--node-size", arguments.base.nodeSize, "ranks of a node")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--id-bytes", arguments.base.idBytes, "4 or 8")->capture_default_str()->check(CLI::IsMember({4, 8}));
  app.add_option("--masked", arguments.base.masked, "share of slots that hold -1")->check(CLI::Range(0.0, 1.0));
  app.add_option("-n", arguments.base.rounds, "timed rounds")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("-w", arguments.base.warmups, "warm-up rounds")->capture_default_str()->check(CLI::NonNegativeNumber);
  app.add_option("--nodes", arguments.lanes.nodes, "balance: nodes")->capture_default_str()->check(CLI::PositiveNumber);
  app.add_option("--lanes", arguments.lanes.lanes, "balance: lanes of a node")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  app.add_option("--routing", arguments.routing, "balance: uniform, imbalanced, zipf:S")->delimiter(',');
  app.add_option("-J,--json", arguments.json, "write the rows to this file, too");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  arguments.lanes.nodeSize = arguments.base.nodeSize;
  std::string command;
  for (int i = 0; i < argc; ++i) command += (i > 0 ? " " : "") + std::string(argv[i]);
  try {
    const int status = run(arguments, command);
    fusco::bench::requirePrinted();
    return status;
  } catch (const std::exception& error) {
    fmt::print(stderr, "plan_perf: {}\n", error.what());
    return 2;
  }
}
