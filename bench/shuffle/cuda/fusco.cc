// fusco through its public header. Ranks that share the one GPU are called for by one thread, in one group and on one
// stream; with several GPUs each rank has a stream, and a thread where nothing is captured.
#include <fmt/format.h>
#include <fusco/fusco.h>

#include <algorithm>
#include <stdexcept>

#include "shuffle/call.h"
#include "shuffle/cuda/implementation.h"

namespace fusco::bench::gpu {

namespace {

constexpr int kOperationTimeoutMs = 20000;

}  // namespace

class Communicators {
 public:
  Communicators(World& world, const Options& options, int sms) : comms_(static_cast<std::size_t>(world.ranks())) {
    for (int rank = 0; rank < world.ranks(); ++rank) {
      if (sms > 0 && smsOfRank(sms, rank, world.ranks(), world.gpus()) == 0)
        throw std::runtime_error(fmt::format("--sms {}: fewer than the ranks of a GPU, each of which takes one", sms));
    }
    fuscoUniqueId id;
    require(fuscoGetUniqueId(&id), nullptr, "fuscoGetUniqueId");
    world.workers().each([&](int rank) {
      fuscoConfig_t config = FUSCO_CONFIG_INIT;
      config.device = fuscoDeviceCuda;
      config.gpu = world.gpuOf(rank);
      config.initTimeoutMs = std::min(options.timeoutSeconds, 60) * 1000;
      config.operationTimeoutMs = std::min(options.timeoutSeconds * 1000, kOperationTimeoutMs);
      if (sms > 0) config.maxSms = smsOfRank(sms, rank, world.ranks(), world.gpus());
      require(fuscoCommInitRankConfig(&comms_[static_cast<std::size_t>(rank)], world.ranks(), id, rank, &config),
              nullptr, "fuscoCommInitRankConfig");
    });
  }
  ~Communicators() {
    for (const fuscoComm_t comm : comms_)
      if (comm != nullptr) fuscoCommDestroy(comm);
  }
  Communicators(const Communicators&) = delete;
  Communicators& operator=(const Communicators&) = delete;
  fuscoComm_t of(int rank) const { return comms_[static_cast<std::size_t>(rank)]; }

 private:
  std::vector<fuscoComm_t> comms_;
};

std::shared_ptr<Communicators> openFusco(World& world, const Options& options, int sms) {
  return std::make_shared<Communicators>(world, options, sms);
}

namespace {

class Fusco : public FuscoShuffle {
 public:
  Fusco(World& world, Tensors& tensors, const Options& options, std::shared_ptr<Communicators> communicators)
      : world_(world), tensors_(tensors), options_(options), comms_(std::move(communicators)) {
    if (options_.graph) return;  // plans are captured, and the host learns no counts
    enqueuePlans(1);
    for (int rank = 0; rank < world_.ranks(); ++rank) {
      fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
      require(fuscoPlanGetInfo(plans_.back()[static_cast<std::size_t>(rank)], &info), comms_->of(rank),
              "fuscoPlanGetInfo");
      if (info.receiveRows != tensors_.map().rowsOf(rank))
        throw std::runtime_error(fmt::format("the plan says that rank {} receives {} rows, the naive shuffle says {}",
                                             rank, info.receiveRows, tensors_.map().rowsOf(rank)));
    }
  }
  ~Fusco() override {
    for (auto& set : plans_) destroy(set);
  }

  void enqueue(int times) override {
    const bool plans = tensors_.op() == Op::dispatch && !options_.planOnce;
    const bool dispatches = tensors_.op() == Op::dispatch;
    forAll(times, plans, true, [&](int rank, fuscoPlan_t plan, cudaStream_t stream) {
      if (dispatches)
        dispatch(rank, plan, stream);
      else
        require(fuscoCombine(plan, tensors_.experts(rank), tensors_.tokens(rank),
                             static_cast<std::size_t>(options_.hidden), typeOf(options_.type), stream),
                comms_->of(rank), "fuscoCombine");
    });
  }

  void enqueuePlans(int times) override { forAll(times, true, false, nullptr); }

  bool bringsScales() const override { return true; }
  std::string remark() const override {
    if (world_.gpus() == 1) return "all ranks called by one thread, on one stream";
    return options_.graph ? "all ranks called by one thread, on a stream each" : "a thread and a stream a rank";
  }

 private:
  using Plans = std::vector<fuscoPlan_t>;
  using Work = std::function<void(int rank, fuscoPlan_t plan, cudaStream_t stream)>;

  void forAll(int times, bool plans, bool works, const Work& work) {
    const bool several = world_.gpus() > 1;
    if (several && !options_.graph) {
      forAllSideBySide(times, plans, works, work);
      return;
    }
    const auto streamOf = [&](int rank) { return several ? world_.ofRank(rank).get() : world_.lead().get(); };
    if (several) world_.forkRanks();
    for (int i = 0; i < times; ++i) {
      if (plans) {
        // Captured plans are the graph's as long as that lives.
        if (!options_.graph && !plans_.empty()) {
          destroy(plans_.back());
          plans_.pop_back();
        }
        plans_.emplace_back(static_cast<std::size_t>(world_.ranks()), nullptr);
        inGroup([&](int rank) { create(rank, plans_.back()[static_cast<std::size_t>(rank)], streamOf(rank)); });
      }
      if (works) inGroup([&](int rank) { work(rank, plans_.back()[static_cast<std::size_t>(rank)], streamOf(rank)); });
    }
    if (several) world_.joinRanks();
  }

  void forAllSideBySide(int times, bool plans, bool works, const Work& work) {
    if (plans_.empty()) plans_.emplace_back(static_cast<std::size_t>(world_.ranks()), nullptr);
    world_.forkRanks();
    world_.workers().each([&](int rank) {
      const OnGpu on(world_.gpuOf(rank));
      const cudaStream_t stream = world_.ofRank(rank).get();
      fuscoPlan_t& plan = plans_.back()[static_cast<std::size_t>(rank)];
      for (int i = 0; i < times; ++i) {
        if (plans) {
          if (plan != nullptr) require(fuscoPlanDestroy(plan), comms_->of(rank), "fuscoPlanDestroy");
          plan = nullptr;
          create(rank, plan, stream);
        }
        if (works) work(rank, plan, stream);
      }
    });
    world_.joinRanks();
  }

  template <typename Body>
  void inGroup(const Body& body) {
    require(fuscoGroupStart(), nullptr, "fuscoGroupStart");
    std::exception_ptr failure;
    try {
      for (int rank = 0; rank < world_.ranks(); ++rank) body(rank);
    } catch (...) {
      failure = std::current_exception();
    }
    const fuscoResult_t ended = fuscoGroupEnd();
    if (failure) std::rethrow_exception(failure);
    require(ended, nullptr, "fuscoGroupEnd");
  }

  void create(int rank, fuscoPlan_t& plan, cudaStream_t stream) {
    const ShuffleMap& map = tensors_.map();
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = tensors_.ids(rank);
    config.idType = fuscoInt32;
    config.weights = tensors_.weights(rank);
    config.tokens = tensors_.tokenPlace(rank).rows;
    config.topk = map.topk;
    config.experts = map.experts;
    config.dedup = dedupOf(options_.dedup);
    if (options_.graph) {
      config.capacityRows = tensors_.capacity();
      config.capacityPolicy = fuscoCapacityDrop;
    }
    require(fuscoPlanCreate(&plan, &config, comms_->of(rank), stream), comms_->of(rank), "fuscoPlanCreate");
  }

  void dispatch(int rank, fuscoPlan_t plan, cudaStream_t stream) {
    fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
    args.input = tensors_.tokens(rank);
    args.output = tensors_.experts(rank);
    args.rowBytes = tensors_.rowBytes();
    if (tensors_.scaleBytes() > 0) {
      args.input2 = tensors_.tokenScales(rank);
      args.output2 = tensors_.expertScales(rank);
      args.rowBytes2 = tensors_.scaleBytes();
    }
    require(fuscoDispatchEx(plan, &args, stream), comms_->of(rank), "fuscoDispatchEx");
  }

  void destroy(Plans& plans) {
    for (fuscoPlan_t& plan : plans)
      if (plan != nullptr) fuscoPlanDestroy(plan);
    plans.clear();
  }

  World& world_;
  Tensors& tensors_;
  const Options& options_;
  std::shared_ptr<Communicators> comms_;
  std::vector<Plans> plans_;  // the last is in use
};

}  // namespace

std::unique_ptr<FuscoShuffle> makeFusco(World& world, Tensors& tensors, const Options& options,
                                        std::shared_ptr<Communicators> communicators) {
  return std::make_unique<Fusco>(world, tensors, options, std::move(communicators));
}

}  // namespace fusco::bench::gpu
