// A rank's side of the harness: makes the data of a case, and runs implementations when told to.
#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <optional>

#include "shuffle/implementation.h"

namespace fusco::bench {
namespace {

class RankServer {
 public:
  RankServer(Session& session, const Options& options, int group, int rank, const Factory& factory)
      : session_(session), options_(options), group_(group), rank_(rank), factory_(factory), cases_(casesOf(options)) {}

  int serve() {
    GroupState& g = session_.group(group_);
    RankState& state = g.ranks[rank_];
    g.joined.fetch_add(1);
    try {
      for (std::uint32_t seen = 0;;) {
        seen = session_.waitForCommand(group_, seen);
        Step step = g.step;
        try {
          execute(g, state);
        } catch (const Abandoned&) {
          throw;
        } catch (const std::exception& error) {
          state.failed = 1;
          std::snprintf(state.text, sizeof state.text, "%s", error.what());
        }
        session_.reportDone(group_);
        if (step == Step::quit) return 0;
      }
    } catch (const Abandoned&) {
      return 1;
    }
  }

 private:
  void execute(GroupState& g, RankState& state) {
    std::string name = g.impl;
    switch (g.step) {
      case Step::prepare:
        prepare(name, g.caseIndex);
        break;
      case Step::check:
        state.wrong = check(name);
        break;
      case Step::run:
        state.stages = run(*running_.at(name), g.warmup, g.iterations);
        break;
      case Step::release:
        running_.erase(name);
        break;
      case Step::quit:
        running_.clear();
        break;
    }
  }

  void prepare(const std::string& name, std::uint32_t caseIndex) {
    if (!context_ || caseIndex != caseIndex_) {
      const Case& which = cases_.at(caseIndex);
      if (isShuffle(which.op) && !routing_) routing_.emplace(makeRoutingSource(options_));
      context_ = makeCase(options_, routing_ ? &*routing_ : nullptr, which, rank_);
      context_->session = &session_;
      context_->group = group_;
      caseIndex_ = caseIndex;
    }
    running_[name] = factory_(name, *context_);
  }

  // Poisons the output, runs once, compares.
  std::uint64_t check(const std::string& name) {
    Implementation& impl = *running_.at(name);
    impl.poisonOutput();
    session_.meet(group_);
    impl.run();
    session_.meet(group_);
    impl.fetchOutput();
    const std::span<std::byte> output = impl.output();
    if (options_.corrupt == name && !output.empty()) {
      // The last byte of an element is its most significant one: no tolerance hides it.
      std::size_t width = bytesOf(options_.type), middle = output.size() / 2 / width * width;
      output[middle + width - 1] ^= std::byte{0x40};
    }
    return context_->wrongIn(output.data(), impl.levels());
  }

  Stages run(Implementation& impl, std::uint32_t warmup, std::uint32_t iterations) {
    Span* times = session_.times(group_, rank_);
    for (std::uint32_t i = 0; i < warmup; ++i) {
      session_.meet(group_);
      impl.run();
    }
    Stages before = impl.stages();
    for (std::uint32_t i = 0; i < iterations; ++i) {
      session_.meet(group_);
      times[i].begin = nowNs();
      impl.run();
      times[i].end = nowNs();
    }
    session_.meet(group_);
    return impl.stages() - before;
  }

  Session& session_;
  const Options& options_;
  int group_, rank_;
  const Factory& factory_;
  std::vector<Case> cases_;
  std::optional<RoutingSource> routing_;
  std::optional<CaseContext> context_;
  std::uint32_t caseIndex_ = 0;
  std::map<std::string, std::unique_ptr<Implementation>> running_;
};

}  // namespace

void Implementation::poisonOutput() {
  const std::span<std::byte> bytes = output();
  poison(bytes.data(), bytes.size());
}

RoutingSource makeRoutingSource(const Options& options) {
  return RoutingSource({options.routing, options.ranks, options.nodes, options.topk, options.experts, options.topkGiven,
                        options.expertsGiven, options.seed});
}

CaseContext makeCase(const Options& options, const RoutingSource* routing, const Case& which, int rank) {
  CaseContext context;
  context.options = &options;
  context.rank = rank;
  context.which = which;
  context.rowBytes = static_cast<std::size_t>(options.hidden) * bytesOf(options.type);
  if (isShuffle(which.op))
    context.map = naiveShuffle(*routing, which.tokens, options.ranks);
  else
    context.moves = naiveMoves(which.op, static_cast<std::uint64_t>(which.bytes), bytesOf(options.type),
                               context.rowBytes, options.ranks, options.seed);
  return context;
}

std::size_t CaseContext::inputBytes(int of) const {
  switch (which.op) {
    case Op::dispatch:
      return static_cast<std::size_t>(map.routing[of].tokens) * rowBytes;
    case Op::combine:
      return static_cast<std::size_t>(map.rowsOf(of)) * rowBytes;
    default:
      return moves.sendBytes[of];
  }
}

std::size_t CaseContext::outputBytes(int of) const {
  switch (which.op) {
    case Op::dispatch:
      return static_cast<std::size_t>(map.rowsOf(of)) * rowBytes;
    case Op::combine:
      return static_cast<std::size_t>(map.routing[of].tokens) * rowBytes;
    default:
      return moves.receiveBytes[of];
  }
}

void CaseContext::fillInput(std::byte* input) const {
  switch (which.op) {
    case Op::dispatch:
      fillTokens(input, map, rank, rowBytes, options->type, options->seed);
      break;
    case Op::combine:
      fillExpertRows(input, map, rank, rowBytes, options->type, options->seed);
      break;
    default:
      fillRow(input, bufferKey(options->seed, rank), 0, moves.sendBytes[rank], options->type);
      break;
  }
}

std::uint64_t CaseContext::wrongIn(const std::byte* output, int levels) const {
  switch (which.op) {
    case Op::dispatch:
      return wrongInDispatch(map, rank, output, rowBytes, options->type, options->seed);
    case Op::combine:
      return wrongInCombine(map, rank, output, options->hidden, options->type, levels, options->seed);
    default:
      return wrongInMoves(moves, rank, output, options->type, options->seed);
  }
}

int serveRank(Session& session, const Options& options, int group, int rank, const Factory& factory) {
  return RankServer(session, options, group, rank, factory).serve();
}

}  // namespace fusco::bench
