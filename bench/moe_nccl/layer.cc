#include "moe_nccl/layer.h"

#include <chrono>

#include "shuffle/routing.h"

namespace fusco::bench::moe {

void ok(ncclResult_t result, const char* what) {
  if (result != ncclSuccess) throw std::runtime_error(std::string(what) + ": " + ncclGetLastError(nullptr));
}

namespace {
std::int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}
}  // namespace

void Timer::begin() {
  device_.wait();
  begin_ = last_ = now();
  parts_ = {};
}

void Timer::ends(Part part) {
  device_.wait();
  const std::int64_t at = now();
  parts_[part] += at - last_;
  last_ = at;
}

Counts::Counts(const World& world)
    : world_(world),
      counts_(world.device, sizeof(std::int64_t) * static_cast<std::size_t>(world.shape.experts)),
      incoming_(world.device,
                sizeof(std::int64_t) * static_cast<std::size_t>(world.shape.ranks * world.shape.localExperts)),
      order_(world.device),
      tokenOf_(world.device),
      sumPlaces_(world.device),
      sumSlots_(world.device) {
  const std::size_t bytes = sizeof(std::int64_t) * static_cast<std::size_t>(world.shape.slots());
  for (Buffer* buffer : {&order_, &tokenOf_, &sumPlaces_, &sumSlots_}) buffer->grow(bytes);
  sorted_ = {counts_.as<std::int64_t>(), order_.as<std::int64_t>(), tokenOf_.as<std::int64_t>(),
             sumPlaces_.as<std::int64_t>(), sumSlots_.as<std::int64_t>()};
  countsHost_.resize(static_cast<std::size_t>(world.shape.experts));
  incomingHost_.resize(static_cast<std::size_t>(world.shape.ranks * world.shape.localExperts));
  starts_.resize(static_cast<std::size_t>(world.shape.localExperts) + 1);
}

void Counts::exchange(const std::int64_t* ids) {
  const Shape& shape = world_.shape;
  Device& device = world_.device;
  device.sortSlots(ids, sorted_);
  OK(ncclGroupStart());
  for (int peer = 0; peer < shape.ranks; ++peer) {
    const int first = firstExpertOf(peer, shape.ranks, shape.experts);
    const int end = firstExpertOf(peer + 1, shape.ranks, shape.experts);
    OK(ncclSend(sorted_.counts + first, static_cast<std::size_t>(end - first), ncclInt64, peer, world_.comm,
                device.stream()));
    OK(ncclRecv(incoming_.as<std::int64_t>() + static_cast<std::ptrdiff_t>(peer) * shape.localExperts,
                static_cast<std::size_t>(shape.localExperts), ncclInt64, peer, world_.comm, device.stream()));
  }
  OK(ncclGroupEnd());
  device.toHost(countsHost_.data(), sorted_.counts, countsHost_.size() * sizeof(std::int64_t));
  device.toHost(incomingHost_.data(), incoming_.bytes(), incomingHost_.size() * sizeof(std::int64_t));

  const auto ranks = static_cast<std::size_t>(shape.ranks), experts = static_cast<std::size_t>(shape.localExperts);
  for (int e = 0; e < shape.localExperts; ++e) {
    const auto i = static_cast<std::size_t>(e);
    starts_[i + 1] = starts_[i];
    for (int peer = 0; peer < shape.ranks; ++peer) starts_[i + 1] += incoming(peer, e);
  }
  chunks_.clear();
  std::vector<std::int64_t> next(starts_.begin(), starts_.end() - 1);
  std::int64_t from = 0;
  for (std::size_t i = 0; i < ranks * experts; ++i) {
    const std::int64_t rows = incomingHost_[i];
    chunks_.push_back({from, next[i % experts], rows});
    from += rows;
    next[i % experts] += rows;
  }
}

std::int64_t Counts::incoming(int peer, int expert) const {
  return incomingHost_[static_cast<std::size_t>(peer * world_.shape.localExperts + expert)];
}

std::int64_t Counts::sendStart(int peer) const {
  std::int64_t rows = 0;
  for (int e = 0; e < firstExpertOf(peer, world_.shape.ranks, world_.shape.experts); ++e)
    rows += countsHost_[static_cast<std::size_t>(e)];
  return rows;
}

std::int64_t Counts::sendRows(int peer) const { return sendStart(peer + 1) - sendStart(peer); }

std::int64_t Counts::receiveRows(int peer) const {
  std::int64_t rows = 0;
  for (int e = 0; e < world_.shape.localExperts; ++e) rows += incoming(peer, e);
  return rows;
}

std::vector<std::string> layerNames() { return {"unchanged", "indexed", "shuffle"}; }

std::unique_ptr<Layer> makeLayer(const std::string& name, const World& world) {
  return name == "unchanged" ? makeNcclLayer(world)
         : name == "indexed" ? makeIndexedLayer(world)
                             : makeShuffleLayer(world);
}

}  // namespace fusco::bench::moe
