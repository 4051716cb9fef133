// As frameworks do it, with NCCL's calls alone: permute by expert, exchange counts, grouped sends and receives, sort
// what came in by expert; and the same way back.
#include "moe_nccl/layer.h"

namespace fusco::bench::moe {

namespace {

class NcclLayer : public Layer {
 public:
  explicit NcclLayer(const World& world)
      : world_(world),
        counts_(world),
        permuted_(world.device),
        received_(world.device),
        byExpert_(world.device),
        results_(world.device) {
    permuted_.grow(static_cast<std::size_t>(world.shape.slots()) * world.shape.rowBytes());
  }

  void step(const Tensors& tensors, Timer& timer) override {
    Device& device = world_.device;
    timer.begin();
    counts_.exchange(tensors.ids);
    const std::size_t bytes = static_cast<std::size_t>(counts_.receivedRows()) * world_.shape.rowBytes();
    for (Buffer* buffer : {&received_, &byExpert_, &results_}) buffer->grow(bytes);
    timer.ends(kRoute);

    device.gatherRows(permuted_.bytes(), tensors.x, counts_.sorted().tokenOf, counts_.sentRows());
    exchangeRows(permuted_.bytes(), received_.bytes(), true);
    device.moveChunks(byExpert_.bytes(), received_.bytes(), counts_.chunks());
    timer.ends(kThere);

    device.experts(byExpert_.bytes(), results_.bytes(), counts_.starts().data());
    timer.ends(kExperts);

    std::vector<Chunk> back = counts_.chunks();
    for (Chunk& chunk : back) std::swap(chunk.from, chunk.to);
    device.moveChunks(received_.bytes(), results_.bytes(), back);
    exchangeRows(received_.bytes(), permuted_.bytes(), false);
    device.weightedSum(tensors.y, permuted_.bytes(), counts_.sorted().sumPlaces, counts_.sorted().sumSlots,
                       tensors.weights);
    timer.ends(kBack);
  }

 private:
  void exchangeRows(const std::byte* from, std::byte* to, bool there) {
    const Shape& shape = world_.shape;
    const auto hidden = static_cast<std::size_t>(shape.hidden);
    OK(ncclGroupStart());
    for (int peer = 0; peer < shape.ranks; ++peer) {
      const auto sends = static_cast<std::size_t>(there ? counts_.sendRows(peer) : counts_.receiveRows(peer));
      const auto receives = static_cast<std::size_t>(there ? counts_.receiveRows(peer) : counts_.sendRows(peer));
      OK(ncclSend(from, sends * hidden, ncclBfloat16, peer, world_.comm, world_.device.stream()));
      OK(ncclRecv(to, receives * hidden, ncclBfloat16, peer, world_.comm, world_.device.stream()));
      from += sends * shape.rowBytes();
      to += receives * shape.rowBytes();
    }
    OK(ncclGroupEnd());
  }

  const World& world_;
  Counts counts_;
  Buffer permuted_, received_, byExpert_, results_;
};

}  // namespace

std::unique_ptr<Layer> makeNcclLayer(const World& world) { return std::make_unique<NcclLayer>(world); }

}  // namespace fusco::bench::moe
