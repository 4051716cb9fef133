#include "shuffle/impl_fusco.h"

#include <fmt/format.h>
#include <fusco/fusco.h>

#include <cstring>
#include <stdexcept>

#include "shuffle/call.h"

namespace fusco::bench {
namespace {

int balanceOf(const std::string& name) {
  return name == "full" ? fuscoBalanceFull : name == "paper" ? fuscoBalancePaper : fuscoBalanceNone;
}

// A tensor in the memory that was asked for.
class Tensor {
 public:
  Tensor(std::size_t bytes, Memory memory) : bytes_(bytes), memory_(memory) {
    if (memory == Memory::window) {
      void* at = nullptr;
      require(fuscoMemAlloc(&at, std::max<std::size_t>(bytes, 1)), nullptr, "fuscoMemAlloc");
      data_ = static_cast<std::byte*>(at);
    } else {
      own_ = Buffer(bytes);
      data_ = own_.data();
      std::memset(data_, 0, bytes);
    }
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (memory_ == Memory::window) fuscoMemFree(data_);
  }
  std::byte* data() const { return data_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  std::size_t bytes_;
  Memory memory_;
  Buffer own_;
  std::byte* data_ = nullptr;
};

class FuscoBase : public Implementation {
 public:
  FuscoBase(const CaseContext& context, fuscoComm_t comm)
      : context_(context),
        comm_(comm),
        input_(context.inputBytes(), context.options->memory),
        output_(context.outputBytes(), context.options->memory) {
    context.fillInput(input_.data());
  }

  std::span<std::byte> output() override { return output_.span(); }
  // As the header promises: one rounding in a node, two across nodes.
  int levels() const override { return context_.options->nodes == 1 ? 1 : 2; }

  Stages stages() const override {
    fuscoStatistics_t s = FUSCO_STATISTICS_INIT;
    require(fuscoCommGetStatistics(comm_, &s), comm_, "fuscoCommGetStatistics");
    return {s.planNs, s.extractNs, s.wireNs, s.placeNs, s.sumNs, s.waitNs, s.wireBytes};
  }

 protected:
  const CaseContext& context_;
  fuscoComm_t comm_;
  Tensor input_, output_;
};

class FuscoShuffle : public FuscoBase {
 public:
  FuscoShuffle(const CaseContext& context, fuscoComm_t comm) : FuscoBase(context, comm) {
    makePlan();
    // The balancer knows the loads of the plan before.
    if (context.options->balance != "none") makePlan();
    fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
    require(fuscoPlanGetInfo(plan_, &info), comm_, "fuscoPlanGetInfo");
    if (info.receiveRows != context.map.rowsOf(context.rank))
      throw std::runtime_error(fmt::format("the plan says that rank {} receives {} rows, the naive shuffle says {}",
                                           context.rank, info.receiveRows, context.map.rowsOf(context.rank)));
    // On several nodes a combine follows a dispatch of its plan.
    if (context.which.op == Op::combine && context.options->nodes > 1) dispatchOnce();
  }
  ~FuscoShuffle() override { fuscoPlanDestroy(plan_); }

  void run() override {
    const Options& o = *context_.options;
    if (context_.which.op == Op::combine) {
      require(fuscoCombine(plan_, input_.data(), output_.data(), static_cast<std::size_t>(o.hidden), typeOf(o.type),
                           nullptr),
              comm_, "fuscoCombine");
      return;
    }
    if (!o.planOnce) makePlan();
    require(fuscoDispatch(plan_, input_.data(), output_.data(), context_.rowBytes, nullptr), comm_, "fuscoDispatch");
  }

 private:
  void makePlan() {
    if (plan_ != nullptr) require(fuscoPlanDestroy(plan_), comm_, "fuscoPlanDestroy");
    plan_ = nullptr;
    const Routing& routing = context_.map.routing[context_.rank];
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = routing.ids.data();
    config.idType = fuscoInt32;
    config.weights = routing.weights.data();
    config.tokens = routing.tokens;
    config.topk = context_.map.topk;
    config.experts = context_.map.experts;
    config.dedup = dedupOf(context_.options->dedup);
    require(fuscoPlanCreate(&plan_, &config, comm_, nullptr), comm_, "fuscoPlanCreate");
  }

  void dispatchOnce() {
    Tensor tokens(static_cast<std::size_t>(context_.map.routing[context_.rank].tokens) * context_.rowBytes,
                  context_.options->memory);
    Tensor rows(context_.inputBytes(), context_.options->memory);
    require(fuscoDispatch(plan_, tokens.data(), rows.data(), context_.rowBytes, nullptr), comm_, "fuscoDispatch");
    context_.session->meet(context_.group);
  }

  fuscoPlan_t plan_ = nullptr;
};

class FuscoAllToAllv : public FuscoBase {
 public:
  FuscoAllToAllv(const CaseContext& context, fuscoComm_t comm) : FuscoBase(context, comm) {
    auto ranks = context.moves.moves.size();
    std::size_t width = bytesOf(context.options->type);
    for (std::size_t source = 0; source < ranks; ++source)
      for (const Move& move : context.moves.moves[source]) {
        if (static_cast<int>(source) == context.rank) {
          sendCounts_.push_back(move.bytes / width);
          sendStarts_.push_back(move.from / width);
        }
        if (move.destination == context.rank) {
          receiveCounts_.push_back(move.bytes / width);
          receiveStarts_.push_back(move.to / width);
        }
      }
  }

  void run() override {
    require(fuscoAllToAllv(input_.data(), sendCounts_.data(), sendStarts_.data(), output_.data(), receiveCounts_.data(),
                           receiveStarts_.data(), typeOf(context_.options->type), comm_, nullptr),
            comm_, "fuscoAllToAllv");
  }

 private:
  std::vector<std::size_t> sendCounts_, sendStarts_, receiveCounts_, receiveStarts_;
};

class FuscoGatherSend : public FuscoBase {
 public:
  FuscoGatherSend(const CaseContext& context, fuscoComm_t comm) : FuscoBase(context, comm) {
    std::size_t ranks = context.moves.moves.size();
    std::uint64_t row = context.moves.rowBytes;
    sends_.resize(ranks);
    receives_.resize(ranks);
    for (std::size_t source = 0; source < ranks; ++source)
      for (const Move& move : context.moves.moves[source]) {
        if (static_cast<int>(source) == context.rank)
          sends_[move.destination].push_back(static_cast<std::int64_t>(move.from / row));
        if (move.destination == context.rank) receives_[source].push_back(static_cast<std::int64_t>(move.to / row));
      }
  }

  void run() override {
    require(fuscoGroupStart(), comm_, "fuscoGroupStart");
    for (std::size_t peer = 0; peer < sends_.size(); ++peer) {
      require(fuscoGatherSend(input_.data(), sends_[peer].size(), context_.moves.rowBytes, sends_[peer].data(),
                              fuscoInt64, static_cast<int>(peer), comm_, nullptr),
              comm_, "fuscoGatherSend");
      require(fuscoScatterRecv(output_.data(), receives_[peer].size(), context_.moves.rowBytes, receives_[peer].data(),
                               fuscoInt64, static_cast<int>(peer), comm_, nullptr),
              comm_, "fuscoScatterRecv");
    }
    require(fuscoGroupEnd(), comm_, "fuscoGroupEnd");
  }

 private:
  std::vector<std::vector<std::int64_t>> sends_, receives_;
};

class FuscoSendRecv : public FuscoBase {
 public:
  using FuscoBase::FuscoBase;

  void run() override {
    int ranks = context_.options->ranks;
    fuscoDataType_t type = typeOf(context_.options->type);
    std::size_t width = bytesOf(context_.options->type);
    require(fuscoGroupStart(), comm_, "fuscoGroupStart");
    require(fuscoSend(input_.data(), context_.inputBytes() / width, type, (context_.rank + 1) % ranks, comm_, nullptr),
            comm_, "fuscoSend");
    require(fuscoRecv(output_.data(), context_.outputBytes() / width, type, (context_.rank + ranks - 1) % ranks, comm_,
                      nullptr),
            comm_, "fuscoRecv");
    require(fuscoGroupEnd(), comm_, "fuscoGroupEnd");
  }
};

}  // namespace

struct FuscoRank::State {
  Session& session;
  const Options& options;
  int rank;
  fuscoComm_t comm = nullptr;

  void connect() {
    if (comm != nullptr) return;
    SessionHeader& header = session.header();
    static_assert(sizeof(fuscoUniqueId) == sizeof header.id);
    if (rank == 0) {
      fuscoUniqueId id;
      require(fuscoGetUniqueId(&id), nullptr, "fuscoGetUniqueId");
      std::memcpy(header.id, &id, sizeof id);
      header.idReady.store(1);
    }
    session.meet(kOwnGroup);
    fuscoUniqueId id;
    std::memcpy(&id, header.id, sizeof id);
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceHost;
    config.nodeId = options.nodes > 1 ? nodeOfRank(rank, options.ranks, options.nodes) : FUSCO_UNSET;
    config.balance = balanceOf(options.balance);
    config.initTimeoutMs = config.operationTimeoutMs = options.timeoutSeconds * 1000;
    require(fuscoCommInitRankConfig(&comm, options.ranks, id, rank, &config), nullptr, "fuscoCommInitRankConfig");
  }
};

FuscoRank::FuscoRank(Session& session, const Options& options, int rank)
    : state_(std::make_unique<State>(State{session, options, rank})) {}

FuscoRank::~FuscoRank() {
  if (state_->comm != nullptr) fuscoCommDestroy(state_->comm);
}

std::unique_ptr<Implementation> FuscoRank::make(const CaseContext& context) {
  state_->connect();
  switch (context.which.op) {
    case Op::dispatch:
    case Op::combine:
      return std::make_unique<FuscoShuffle>(context, state_->comm);
    case Op::alltoallv:
      return std::make_unique<FuscoAllToAllv>(context, state_->comm);
    case Op::gathersend:
      return std::make_unique<FuscoGatherSend>(context, state_->comm);
    case Op::sendrecv:
      return std::make_unique<FuscoSendRecv>(context, state_->comm);
  }
  throw std::runtime_error("no such operation");
}

}  // namespace fusco::bench
