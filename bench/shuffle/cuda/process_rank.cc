#include "shuffle/cuda/process_rank.h"

#include <fmt/format.h>
#include <fusco/fusco.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <utility>

#include "shuffle/call.h"
#include "shuffle/cuda/deal.h"
#include "shuffle/cuda/device.h"
#include "shuffle/cuda/tensors.h"

namespace fusco::bench::gpu {

struct ProcessRank::State {
  Session& session;
  const Options& options;
  int rank, device;
  bool sumsCross;
  fuscoComm_t comm = nullptr;
  int sms = 0;

  void connect(int wanted) {
    if (comm != nullptr && sms == wanted) return;
    if (comm != nullptr) fuscoCommDestroy(comm);
    comm = nullptr;
    SessionHeader& header = session.header();
    if (rank == 0) {
      fuscoUniqueId id;
      require(fuscoGetUniqueId(&id), nullptr, "fuscoGetUniqueId");
      std::memcpy(header.id, &id, sizeof id);
    }
    session.meet(kOwnGroup);
    fuscoUniqueId id;
    std::memcpy(&id, header.id, sizeof id);
    session.meet(kOwnGroup);  // nobody makes the next id before all have this one
    fuscoConfig_t config = FUSCO_CONFIG_INIT;
    config.device = fuscoDeviceCuda;
    config.gpu = device;
    config.initTimeoutMs = config.operationTimeoutMs = options.timeoutSeconds * 1000;
    if (wanted > 0) {
      config.maxSms = smsOfRank(wanted, rank, options.ranks, gpusFor(options.gpus, gpusPresent(), options.ranks));
      if (config.maxSms == 0)
        throw std::runtime_error(
            fmt::format("--sms {}: fewer than the ranks of a GPU, each of which takes one", wanted));
    }
    require(fuscoCommInitRankConfig(&comm, options.ranks, id, rank, &config), nullptr, "fuscoCommInitRankConfig");
    sms = wanted;
  }
};

namespace {

class RankShuffle : public Implementation {
 public:
  RankShuffle(const CaseContext& context, fuscoComm_t comm, int device, bool sumsCross)
      : context_(context),
        sumsCross_(sumsCross),
        comm_(comm),
        stream_(device),
        input_(device, std::max(context.inputBytes(), heldBytes())),
        output_(device, std::max(context.outputBytes(), heldBytes())),
        ids_(device, routing().ids),
        weights_(device, routing().weights),
        seen_(context.outputBytes()) {
    Buffer filled(context.inputBytes());
    context.fillInput(filled.data());
    if (context.inputBytes() > 0)
      FUSCO_BENCH_CUDA(cudaMemcpy(input_.at(), filled.data(), context.inputBytes(), cudaMemcpyHostToDevice));
    plan();
    if (context.options->graph)
      replay_ = std::make_unique<Replay>(
          stream_, [this] { shuffle(); }, 1);
  }
  ~RankShuffle() override {
    cudaStreamSynchronize(stream_.get());
    replay_.reset();
    for (const fuscoPlan_t plan : {plan_, capturedPlan_})
      if (plan != nullptr) fuscoPlanDestroy(plan);
  }

  void run() override {
    if (replay_ != nullptr) {
      replay_->launchOne(stream_);
    } else {
      shuffle();
    }
    FUSCO_BENCH_CUDA(cudaStreamSynchronize(stream_.get()));
  }

  std::span<std::byte> output() override { return seen_.span(); }
  int levels() const override { return sumsCross_ ? 2 : 1; }
  void poisonOutput() override {
    poison(seen_.data(), seen_.size());
    if (seen_.size() == 0) return;
    FUSCO_BENCH_CUDA(cudaMemcpy(output_.at(), seen_.data(), seen_.size(), cudaMemcpyHostToDevice));
  }
  void fetchOutput() override {
    if (seen_.size() > 0)
      FUSCO_BENCH_CUDA(cudaMemcpy(seen_.data(), output_.at(), seen_.size(), cudaMemcpyDeviceToHost));
  }

  Stages stages() const override {
    fuscoStatistics_t s = FUSCO_STATISTICS_INIT;
    require(fuscoCommGetStatistics(comm_, &s), comm_, "fuscoCommGetStatistics");
    return {s.planNs, s.extractNs, s.wireNs, s.placeNs, s.sumNs, s.waitNs, s.wireBytes};
  }

 private:
  const Routing& routing() const { return context_.map.routing[static_cast<std::size_t>(context_.rank)]; }

  std::int64_t capacityRows() const {
    std::int64_t most = 1;
    for (int r = 0; r < context_.options->ranks; ++r) most = std::max(most, context_.map.rowsOf(r));
    return most;
  }
  // Experts' rows have to have room for what any rank may receive.
  std::size_t heldBytes() const {
    return context_.options->graph ? static_cast<std::size_t>(capacityRows()) * context_.rowBytes : 0;
  }

  void shuffle() {
    const Options& o = *context_.options;
    if (context_.which.op == Op::combine) {
      require(fuscoCombine(plan_, input_.at(), output_.at(), static_cast<std::size_t>(o.hidden), typeOf(o.type),
                           stream_.get()),
              comm_, "fuscoCombine");
    } else {
      if (!o.planOnce) plan();
      require(fuscoDispatch(plan_, input_.at(), output_.at(), context_.rowBytes, stream_.get()), comm_,
              "fuscoDispatch");
    }
  }

  void plan() {
    if (context_.options->graph) std::swap(plan_, capturedPlan_);  // the first one, not captured, stays
    if (plan_ != nullptr) require(fuscoPlanDestroy(plan_), comm_, "fuscoPlanDestroy");
    plan_ = nullptr;
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = ids_.at();
    config.idType = fuscoInt32;
    config.weights = weights_.at();
    config.tokens = routing().tokens;
    config.topk = context_.map.topk;
    config.experts = context_.map.experts;
    config.dedup = dedupOf(context_.options->dedup);
    if (context_.options->graph) {
      config.capacityPolicy = fuscoCapacityDrop;
      config.capacityRows = capacityRows();
    }
    require(fuscoPlanCreate(&plan_, &config, comm_, stream_.get()), comm_, "fuscoPlanCreate");
  }

  const CaseContext& context_;
  const bool sumsCross_;
  fuscoComm_t comm_;
  Stream stream_;
  Memory input_, output_;
  List<std::int32_t> ids_;
  List<float> weights_;
  Buffer seen_;  // the output, on the host
  fuscoPlan_t plan_ = nullptr, capturedPlan_ = nullptr;
  std::unique_ptr<Replay> replay_;  // what is timed, with --graph
};

}  // namespace

ProcessRank::ProcessRank(Session& session, const Options& options, int rank) {
  const int gpus = gpusFor(options.gpus, gpusPresent(), options.ranks);
  const int device = gpuOfRank(rank, options.ranks, gpus);
  FUSCO_BENCH_CUDA(cudaSetDevice(device));
  state_ = std::make_unique<State>(State{session, options, rank, device, sumsCrossGpus(gpus)});
}

ProcessRank::~ProcessRank() {
  if (state_->comm != nullptr) fuscoCommDestroy(state_->comm);
}

std::unique_ptr<Implementation> ProcessRank::make(const CaseContext& context) {
  state_->connect(context.which.sms);
  return std::make_unique<RankShuffle>(context, state_->comm, state_->device, state_->sumsCross);
}

void describeGpus(const Options& options, Machine& machine) {
  machine.gpus = gpusFor(options.gpus, gpusPresent(), options.ranks);
  machine.gpu = gpuName(0);
  machine.driver = driverName();
}

}  // namespace fusco::bench::gpu
