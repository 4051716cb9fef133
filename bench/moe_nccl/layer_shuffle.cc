// Nothing of its own is left: the routing map becomes a plan, dispatch brings rows in expert order, combine brings them
// back and sums them.
#include "fusco/fusco.h"
#include "moe_nccl/layer.h"

namespace fusco::bench::moe {

namespace {

void check(fuscoResult_t result, const char* what) {
  if (result != fuscoSuccess) throw std::runtime_error(std::string(what) + ": " + fuscoGetLastError(nullptr));
}
#define CHECK(call) check((call), #call)

class ShuffleLayer : public Layer {
 public:
  explicit ShuffleLayer(const World& world) : world_(world), byExpert_(world.device), results_(world.device) {
    OK(fuscoNcclComm(world.comm, &comm_));
  }

  void step(const Tensors& tensors, Timer& timer) override {
    const Shape& shape = world_.shape;
    const cudaStream_t stream = world_.device.stream();
    timer.begin();
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = tensors.ids;
    config.weights = tensors.weights;
    config.tokens = shape.tokens;
    config.topk = shape.topk;
    config.experts = shape.experts;
    fuscoPlan_t made = nullptr;
    CHECK(fuscoPlanCreate(&made, &config, comm_, stream));
    const std::unique_ptr<fuscoPlan, fuscoResult_t (*)(fuscoPlan_t)> plan(made, &fuscoPlanDestroy);
    fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
    CHECK(fuscoPlanGetInfo(made, &info));
    const std::size_t bytes = static_cast<std::size_t>(info.receiveRows) * shape.rowBytes();
    for (Buffer* buffer : {&byExpert_, &results_}) buffer->grow(bytes);
    timer.ends(kRoute);

    CHECK(fuscoDispatch(made, tensors.x, byExpert_.bytes(), shape.rowBytes(), stream));
    timer.ends(kThere);

    const std::vector<std::int64_t> starts(info.localExpertStart, info.localExpertStart + info.localExperts + 1);
    world_.device.experts(byExpert_.bytes(), results_.bytes(), starts.data());
    timer.ends(kExperts);

    CHECK(
        fuscoCombine(made, results_.bytes(), tensors.y, static_cast<std::size_t>(shape.hidden), fuscoBfloat16, stream));
    timer.ends(kBack);
  }

 private:
  const World& world_;
  fuscoComm_t comm_ = nullptr;
  Buffer byExpert_, results_;
};

}  // namespace

std::unique_ptr<Layer> makeShuffleLayer(const World& world) { return std::make_unique<ShuffleLayer>(world); }

}  // namespace fusco::bench::moe
