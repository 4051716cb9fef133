#include "fault/choose.h"

#include <cstdlib>
#include <map>
#include <random>

namespace fusco::fault {

const std::vector<std::string> kPhases = {"bootstrap", "connect", "plan", "dispatch", "combine", "destroy"};

std::uint64_t seedOfRun() {
  const char* text = std::getenv("FUSCO_TEST_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

namespace {

struct Moment {
  const char* point;
  int number;
};
// The moments of a phase that every rank comes by.
const std::vector<Moment>& momentsOf(const std::string& phase) {
  static const std::map<std::string, std::vector<Moment>> moments = {
      {"bootstrap", {{"meet", 0}, {"meet", 1}}},
      {"connect", {{"connect", 0}, {"connect", 1}, {"connect", 2}}},
      {"plan", {{"plan", -1}, {"plan", 0}, {"plan", 1}, {"plan", 3}, {"plan", 4}}},
      {"dispatch",
       {{"dispatch", -1}, {"dispatch", 0}, {"dispatch", 1}, {"dispatch", 2}, {"dispatch", 3}, {"dispatch", 4}}},
      {"combine", {{"combine", -1}, {"combine", 0}, {"combine", 1}, {"combine", 2}, {"combine", 3}, {"combine", 4}}},
      {"destroy", {{"destroy", 0}, {"destroy", 1}, {"destroy", 2}}},
  };
  return moments.at(phase);
}

}  // namespace

std::vector<FaultCase> eachPhase(Fault fault, const Layout& layout, std::int64_t limitMs,
                                 const std::vector<std::string>& phases) {
  std::vector<FaultCase> cases;
  for (const std::string& phase : phases) {
    std::seed_seq seeds{seedOfRun(), static_cast<std::uint64_t>(fault), static_cast<std::uint64_t>(layout.ranks()),
                        static_cast<std::uint64_t>(layout.nodes), static_cast<std::uint64_t>(cases.size())};
    std::mt19937 random(seeds);
    const auto& moments = momentsOf(phase);
    Moment moment = moments[random() % moments.size()];
    // Of a rank that has not come yet only the time-out tells.
    if (phase == "bootstrap" && (fault == Fault::kill || fault == Fault::exit)) moment = {"meet", 1};
    FaultCase one{};
    one.fault = fault;
    one.phase = phase;
    one.point = moment.point;
    one.number = moment.number;
    one.layout = layout;
    one.victim = static_cast<int>(random() % static_cast<unsigned>(layout.ranks()));
    one.seed = random() % 100000;
    one.limitMs = limitMs;
    one.maySucceed = phase == "destroy";
    cases.push_back(one);
  }
  return cases;
}

void atAnotherMachine(FaultCase& one) {
  one.point = "meet";
  one.number = 1;
  one.victim = one.layout.ranksPerNode;
  one.held = one.layout.ranks() - 1;
}

}  // namespace fusco::fault
