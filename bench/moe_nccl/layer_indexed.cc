// The permutes are gone: rows are sent from where they are and received where they belong, by lists of rows. Counts
// are exchanged as before.
#include "moe_nccl/layer.h"

namespace fusco::bench::moe {

namespace {

class IndexedLayer : public Layer {
 public:
  explicit IndexedLayer(const World& world)
      : world_(world),
        counts_(world),
        byExpert_(world.device),
        results_(world.device),
        slotRows_(world.device),
        places_(world.device) {
    slotRows_.grow(static_cast<std::size_t>(world.shape.slots()) * world.shape.rowBytes());
  }

  void step(const Tensors& tensors, Timer& timer) override {
    const Shape& shape = world_.shape;
    timer.begin();
    counts_.exchange(tensors.ids);
    const auto rows = static_cast<std::size_t>(counts_.receivedRows());
    for (Buffer* buffer : {&byExpert_, &results_}) buffer->grow(rows * shape.rowBytes());
    placesHost_.clear();
    for (const Chunk& chunk : counts_.chunks()) {
      for (std::int64_t row = 0; row < chunk.rows; ++row) placesHost_.push_back(chunk.to + row);
    }
    places_.grow(rows * sizeof(std::int64_t));
    world_.device.toDevice(places_.bytes(), placesHost_.data(), rows * sizeof(std::int64_t));
    timer.ends(kRoute);

    const std::int64_t* const places = places_.as<std::int64_t>();
    move(tensors.x, counts_.sorted().tokenOf, byExpert_.bytes(), places, true);
    timer.ends(kThere);

    world_.device.experts(byExpert_.bytes(), results_.bytes(), counts_.starts().data());
    timer.ends(kExperts);

    move(results_.bytes(), places, slotRows_.bytes(), counts_.sorted().order, false);
    world_.device.weightedSum(tensors.y, slotRows_.bytes(), counts_.sorted().sumSlots, counts_.sorted().sumSlots,
                              tensors.weights);
    timer.ends(kBack);
  }

 private:
  // Row sendList[i] of `from` goes to row receiveList[j] of `to`; both lists by peer.
  void move(const std::byte* from, const std::int64_t* sendList, std::byte* to, const std::int64_t* receiveList,
            bool there) {
    const Shape& shape = world_.shape;
    const auto hidden = static_cast<std::size_t>(shape.hidden);
    const int rowBytes = static_cast<int>(shape.rowBytes());
    OK(ncclGroupStart());
    for (int peer = 0; peer < shape.ranks; ++peer) {
      const std::int64_t sends = there ? counts_.sendRows(peer) : counts_.receiveRows(peer);
      const std::int64_t receives = there ? counts_.receiveRows(peer) : counts_.sendRows(peer);
      OK(gatherSend(from, static_cast<std::size_t>(sends) * hidden, ncclBfloat16, peer, world_.comm,
                    world_.device.stream(), sendList, rowBytes));
      OK(scatterRecv(to, static_cast<std::size_t>(receives) * hidden, ncclBfloat16, peer, world_.comm,
                     world_.device.stream(), receiveList, rowBytes));
      sendList += sends;
      receiveList += receives;
    }
    OK(ncclGroupEnd());
  }

  const World& world_;
  Counts counts_;
  Buffer byExpert_, results_, slotRows_, places_;
  std::vector<std::int64_t> placesHost_;
};

}  // namespace

std::unique_ptr<Layer> makeIndexedLayer(const World& world) { return std::make_unique<IndexedLayer>(world); }

}  // namespace fusco::bench::moe
