// The backward of combine on GPUs.
#include <algorithm>

#include "engine/device/operation.h"
#include "engine/device/plan_memory.h"
#include "engine/shuffle.h"

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {

class DeviceBackward : public DeviceOperation {
 public:
  DeviceBackward(Engine& engine, std::shared_ptr<PlanState> plan, const CombineBackwardRequest& request,
                 cuda::Stream stream)
      : DeviceOperation(OperationKind::combineBackward, engine, std::move(plan), stream), request_(request) {
    domain_.checkPointer("outputGradient", request_.outputGradient);
    domain_.checkPointer("expertRows", request_.expertRows);
    domain_.checkPointer("inputGradient", request_.inputGradient);
    domain_.checkPointer("weightGradient", request_.weightGradient);
    domain_.checkRowBytes(request_.elements * exec::elementBytes(request_.type));
  }

 protected:
  void announce(Meeting::Announcement& announcement) override;
  void bind() override;
  void launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget, cuda::Stream stream) override;

 private:
  const CombineBackwardRequest request_;
  std::vector<std::byte*> bases_, expertBases_;  // by local index
};

void DeviceBackward::announce(Meeting::Announcement& announcement) {
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  const std::size_t rowBytes = request_.elements * exec::elementBytes(request_.type);
  announcement.rows = rows;
  announcement.parameters = parameters(rowBytes, 0, static_cast<std::uint64_t>(request_.type), 0);
  announceTensor(announcement, kRows, request_.inputGradient, rows * rowBytes);
  announceTensor(announcement, kRows2, request_.expertRows, rows * rowBytes);
}

void DeviceBackward::bind() {
  bases_.clear();
  expertBases_.clear();
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    bases_.push_back(tensorOf(i, kRows));
    expertBases_.push_back(tensorOf(i, kRows2));
  }
}

void DeviceBackward::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  kernels::BackArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.topk = plan_->request.map.topk;
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceBackward&>(*all[i]);
    const plan::ArenaHeader& header = *one.plan_->view.header;
    args.maxTokens = std::max(args.maxTokens, static_cast<int>(header.tokens));
    args.ranks[i].plan = one.plan_->device->pointers();
    args.ranks[i].gradient = one.request_.outputGradient;
    args.ranks[i].dots = one.request_.weightGradient;
    const auto slots = static_cast<std::size_t>(header.tokens) * static_cast<std::size_t>(args.topk);
    if (slots > 0) cuda::fill(one.request_.weightGradient, 0, slots * sizeof(float), stream);
  }
  std::copy(bases_.begin(), bases_.end(), args.bases);
  std::copy(expertBases_.begin(), expertBases_.end(), args.expertBases);
  cuda::back(args, budget, stream);
}

}  // namespace

std::unique_ptr<Operation> makeDeviceBackward(Engine& engine, std::shared_ptr<PlanState> plan,
                                              const CombineBackwardRequest& request, void* stream) {
  if (engine.deviceExecutor() != nullptr) {
    CombineBackwardRequest onHost = request;
    onHost.stream = stream;
    return makeCombineBackward(engine, std::move(plan), onHost);
  }
  return std::make_unique<DeviceBackward>(engine, std::move(plan), request, stream);
}

}  // namespace fusco::engine
