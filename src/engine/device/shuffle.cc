#include "engine/device/shuffle.h"

#include <fmt/format.h>

#include <algorithm>

namespace fusco::engine {

namespace cuda = exec::cuda;

namespace {
int mostTokens(const std::vector<DeviceOperation*>& all) {
  std::int64_t most = 0;
  for (DeviceOperation* one : all) most = std::max(most, one->plan().request.map.tokens);
  return static_cast<int>(most);
}
}  // namespace

DeviceDispatch::DeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request,
                               cuda::Stream stream)
    : DeviceOperation(OperationKind::dispatch, engine, std::move(plan), stream), request_(request) {}

void DeviceDispatch::announce(Meeting::Announcement& announcement) {
  domain_.checkPointer("input", request_.input);
  domain_.checkPointer("output", request_.output);
  domain_.checkPointer("input2", request_.input2);
  domain_.checkPointer("output2", request_.output2);
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  announcement.rows = rows;
  announcement.parameters = parameters(request_.rowBytes, request_.rowBytes2, 0, request_.castToFp8 ? 1 : 0);
  announceTensor(announcement, kRows, request_.output, rows * request_.rowBytes);
  announceTensor(announcement, kRows2, request_.output2, rows * request_.rowBytes2);
  plan_->device->usedOn(stream(), capturing());
}

void DeviceDispatch::bind() {
  for (auto& bases : bases_) bases.clear();
  for (int i = 0; i < engine_.nodeRanks(); ++i) {
    bases_[0].push_back(tensorOf(i, kRows));
    bases_[1].push_back(tensorOf(i, kRows2));
  }
}

kernels::PlaceArgs DeviceDispatch::placeArgs(const std::vector<DeviceOperation*>& all, int tensor) const {
  kernels::PlaceArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.rowBytes = tensor == 0 ? request_.rowBytes : request_.rowBytes2;
  args.sourceStride = args.destinationStride = args.rowBytes;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceDispatch&>(*all[i]);
    args.ranks[i].plan = one.plan_->device->pointers(one.engine_.streams().ownFlow);
    args.ranks[i].source = tensor == 0 ? one.request_.input : one.request_.input2;
  }
  std::copy(bases_[tensor].begin(), bases_[tensor].end(), args.bases);
  return args;
}

void DeviceDispatch::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                               cuda::Stream stream) {
  if (plan_->request.zeroFill) {
    for (DeviceOperation* one : all) {
      const auto& dispatch = static_cast<const DeviceDispatch&>(*one);
      const auto rows = static_cast<std::size_t>(one->plan().receiveRows());
      if (rows == 0) continue;
      cuda::fill(dispatch.request_.output, 0, rows * request_.rowBytes, stream);
      if (request_.rowBytes2 > 0) cuda::fill(dispatch.request_.output2, 0, rows * request_.rowBytes2, stream);
    }
  }
  cuda::place(placeArgs(all, 0), budget, stream);
  if (request_.rowBytes2 > 0) cuda::place(placeArgs(all, 1), budget, stream);
}

Outcome DeviceDispatch::finish() {
  Statistics& statistics = engine_.statistics();
  if (!plan_->device->countsStayOnDevice()) {
    const auto entries = static_cast<std::uint64_t>(plan_->view.header->entries);
    statistics.rowsPlaced += entries;
    statistics.bytesPlaced += entries * (request_.rowBytes + request_.rowBytes2);
  }
  plan_->dispatched = true;
  return Outcome::complete;
}

DeviceCombine::DeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request,
                             cuda::Stream stream)
    : DeviceOperation(OperationKind::combine, engine, std::move(plan), stream), request_(request) {
  if (plan_->request.options.layout == plan::Layout::rankOrder) request_.weighted = false;
}

void DeviceCombine::announce(Meeting::Announcement& announcement) {
  domain_.checkPointer("input", request_.input);
  domain_.checkPointer("output", request_.output);
  domain_.checkPointer("bias", request_.bias);
  const auto rows = static_cast<std::size_t>(plan_->receiveRows());
  const std::size_t rowBytes = request_.elements * exec::elementBytes(request_.type);
  announcement.rows = rows;
  announcement.parameters = parameters(rowBytes, 0, static_cast<std::uint64_t>(request_.type),
                                       (request_.weighted ? 1u : 0u) | (request_.partialsFp32 ? 2u : 0u));
  announceTensor(announcement, kRows, request_.input, rows * rowBytes);
  plan_->device->usedOn(stream(), capturing());
}

void DeviceCombine::bind() {
  bases_.clear();
  for (int i = 0; i < engine_.nodeRanks(); ++i) bases_.push_back(tensorOf(i, kRows));
}

void DeviceCombine::launchAll(const std::vector<DeviceOperation*>& all, const kernels::Budget& budget,
                              cuda::Stream stream) {
  kernels::SumArgs args{};
  args.rankCount = static_cast<int>(all.size());
  args.maxTokens = mostTokens(all);
  args.topk = plan_->request.map.topk;
  args.elements = request_.elements;
  args.type = static_cast<kernels::SumType>(request_.type);
  args.weighted = request_.weighted;
  for (std::size_t i = 0; i < all.size(); ++i) {
    const auto& one = static_cast<const DeviceCombine&>(*all[i]);
    args.ranks[i].plan = one.plan_->device->pointers(one.engine_.streams().ownFlow);
    args.ranks[i].out = one.request_.output;
    args.ranks[i].bias = one.request_.bias;
  }
  std::copy(bases_.begin(), bases_.end(), args.bases);
  cuda::sum(args, budget, stream);
}

std::unique_ptr<Operation> makeDeviceDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                              const DispatchRequest& request, void* stream) {
  return std::make_unique<DeviceDispatch>(engine, std::move(plan), request, stream);
}

std::unique_ptr<Operation> makeDeviceCombine(Engine& engine, std::shared_ptr<PlanState> plan,
                                             const CombineRequest& request, void* stream) {
  return std::make_unique<DeviceCombine>(engine, std::move(plan), request, stream);
}

}  // namespace fusco::engine
