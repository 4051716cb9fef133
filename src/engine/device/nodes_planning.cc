// Planning by ranks on GPUs of several nodes: the host plans, with a copy of the routing map, and brings the counts to
// the GPU.
#include <fmt/format.h>

#include "engine/device/plan_memory.h"
#include "engine/device/rows.h"
#include "engine/planning.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

class NodesPlanning : public Planning {
 public:
  NodesPlanning(Engine& engine, std::shared_ptr<PlanState> plan, cuda::Stream stream)
      : Planning(engine, std::move(plan)), stream_(stream) {
    if (plan_->request.tokensOnDevice == nullptr) return;
    fail(
        Code::invalidUsage,
        fmt::format("rank {}: tokensOnDevice goes with communicators of one node; this one has {}, and the host plans: "
                    "give the number of tokens",
                    engine.fabric().rank(), engine.topology().nodes()));
  }

 protected:
  void copyRouting() override {
    PlanState& p = *plan_;
    const plan::RoutingMap& map = p.request.map;
    settleTensors(engine_, stream_, operationName(kind()), {{"expertIds", map.ids}, {"weights", map.weights}});
    const auto slots = static_cast<std::size_t>(map.tokens) * static_cast<std::size_t>(map.topk);
    exec::CudaExecutor& executor = *engine_.deviceExecutor();
    executor.copy(p.ids.data(), map.ids, slots * static_cast<std::size_t>(map.idBytes));
    if (map.weights != nullptr) executor.copy(p.weights.data(), map.weights, slots * sizeof(float));
    executor.fence();
  }

  void prepare() override {
    Planning::prepare();
    plan_->device->holdBeside(plan_->request, plan_->rowsToHold());
    bringCounts(*plan_);
  }

 private:
  const cuda::Stream stream_;
};

}  // namespace

std::unique_ptr<Operation> makeNodesPlanning(Engine& engine, std::shared_ptr<PlanState> plan, void* stream) {
  return std::make_unique<NodesPlanning>(engine, std::move(plan), stream);
}

}  // namespace fusco::engine
