#include "shuffle/limit.h"

#include <algorithm>

#include "shuffle/stream.h"
#include "shuffle/wire.h"

namespace fusco::bench {
namespace {

class DispatchLimit : public Implementation {
 public:
  DispatchLimit(const CaseContext& context, Stores stores)
      : context_(context), stores_(stores), input_(context.inputBytes()) {
    context.fillInput(input_.data());
    const Routing& routing = context.map.routing[context.rank];
    first_.push_back(0);
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      for (int k = 0; k < context.map.topk; ++k) {
        std::size_t at = static_cast<std::size_t>(t) * context.map.topk + k;
        if (routing.ids[at] < 0) continue;
        int rank = rankOfExpert(routing.ids[at], context.map.ranks, context.map.experts);
        places_.push_back(context.session->window(rank) +
                          static_cast<std::size_t>(context.map.row[context.rank][at]) * context.rowBytes);
      }
      first_.push_back(places_.size());
    }
  }

  void run() override {
    std::size_t tokens = first_.size() - 1, rowBytes = context_.rowBytes;
    for (std::size_t t = 0; t < tokens; ++t)
      copyRow(input_.data() + t * rowBytes, input_.data() + std::min(t + 1, tokens - 1) * rowBytes,
              places_.data() + first_[t], static_cast<int>(first_[t + 1] - first_[t]), rowBytes, stores_);
    storeFence();
  }

  std::span<std::byte> output() override { return {context_.session->window(context_.rank), context_.outputBytes()}; }

 private:
  const CaseContext& context_;
  Stores stores_;
  Buffer input_;
  std::vector<std::byte*> places_;
  std::vector<std::size_t> first_;
};

class CombineLimit : public Implementation {
 public:
  CombineLimit(const CaseContext& context, Stores stores) : context_(context), stores_(stores) {
    context.fillInput(context.session->window(context.rank));
    const Routing& routing = context.map.routing[context.rank];
    first_.push_back(0);
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      for (int k = 0; k < context.map.topk; ++k) {
        std::size_t at = static_cast<std::size_t>(t) * context.map.topk + k;
        if (routing.ids[at] < 0) continue;
        int rank = rankOfExpert(routing.ids[at], context.map.ranks, context.map.experts);
        rows_.push_back(context.session->window(rank) +
                        static_cast<std::size_t>(context.map.row[context.rank][at]) * context.rowBytes);
        weights_.push_back(routing.weights[at]);
      }
      first_.push_back(rows_.size());
    }
    context.session->meet(context.group);
  }

  void run() override {
    std::size_t tokens = first_.size() - 1;
    for (std::size_t t = 0; t < tokens; ++t)
      sumRows(rows_.data() + first_[t], weights_.data() + first_[t], static_cast<int>(first_[t + 1] - first_[t]),
              rows_.data() + first_[t + 1], t + 1 < tokens ? static_cast<int>(first_[t + 2] - first_[t + 1]) : 0,
              output().data() + t * context_.rowBytes, static_cast<std::size_t>(context_.options->hidden),
              context_.options->type, stores_);
    storeFence();
  }

  std::span<std::byte> output() override { return {context_.session->output(context_.rank), context_.outputBytes()}; }

 private:
  const CaseContext& context_;
  Stores stores_;
  std::vector<const std::byte*> rows_;
  std::vector<float> weights_;
  std::vector<std::size_t> first_;
};

class MoveLimit : public Implementation {
 public:
  MoveLimit(const CaseContext& context, Stores stores)
      : context_(context), stores_(stores), input_(context.inputBytes()) {
    context.fillInput(input_.data());
  }

  void run() override {
    for (const Move& move : context_.moves.moves[context_.rank]) {
      std::byte* place = context_.session->window(move.destination) + move.to;
      copyRow(input_.data() + move.from, input_.data() + move.from, &place, 1, move.bytes, stores_);
    }
    storeFence();
  }

  std::span<std::byte> output() override { return {context_.session->window(context_.rank), context_.outputBytes()}; }

 private:
  const CaseContext& context_;
  Stores stores_;
  Buffer input_;
};

class Fill : public Implementation {
 public:
  explicit Fill(const CaseContext& context) : context_(context) {}

  void run() override {
    fill(output().data(), output().size(), Stores::nonTemporal);
    storeFence();
  }

  std::span<std::byte> output() override {
    std::byte* at = context_.which.op == Op::combine ? context_.session->output(context_.rank)
                                                     : context_.session->window(context_.rank);
    return {at, context_.outputBytes()};
  }

 private:
  const CaseContext& context_;
};

}  // namespace

bool isLimit(const std::string& name) {
  return name == "limit-nt" || name == "limit-plain" || name == "fill" || name == "wire";
}

std::unique_ptr<Implementation> makeLimit(const std::string& name, const CaseContext& context) {
  if (name == "fill") return std::make_unique<Fill>(context);
  if (name == "wire") return context.options->net == "verbs" ? makeVerbsWire(context) : makeWire(context);
  Stores stores = name == "limit-nt" ? Stores::nonTemporal : Stores::plain;
  switch (context.which.op) {
    case Op::dispatch:
      return std::make_unique<DispatchLimit>(context, stores);
    case Op::combine:
      return std::make_unique<CombineLimit>(context, stores);
    default:
      return std::make_unique<MoveLimit>(context, stores);
  }
}

}  // namespace fusco::bench
