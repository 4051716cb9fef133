// Dispatch: tokens to experts (arXiv 2512.22036, section 3.3).
#pragma once

#include <vector>

#include "engine/placer.h"
#include "engine/shuffle_operation.h"
#include "engine/stream_io.h"

namespace fusco::engine {

class Dispatch : public ShuffleOperation {
 public:
  Dispatch(Engine& engine, std::shared_ptr<PlanState> plan, const DispatchRequest& request);
  ~Dispatch() override { noLongerUnderWay(); }
  void giveUp() override {
    noLongerUnderWay();
    ShuffleOperation::giveUp();
  }

 protected:
  void reset() override;
  Outcome run(const Step& step) override;

 private:
  struct Tensor {
    const std::byte* input;
    std::byte* output;
    std::size_t rowBytes;
    MemoryRole role;
    bool ofLibrary() const { return role == kExtra; }
  };

  Outcome announceReady();
  Outcome bindPeers();
  Outcome put();
  Outcome extract(std::size_t stream);
  Outcome place(std::size_t stream);
  Outcome finish();
  void noLongerUnderWay();
  void castInput();
  void putRows(std::size_t begin, std::size_t end);
  bool takeIn(transport::PostedLink& link, std::size_t stream, const Slice& slice, bool whole);
  void openPlaces();
  void copyFromFirst(const Slice& slice);
  bool findPlaces(const Slice& slice);
  void record(std::size_t stream, const Slice& slice);
  void sortLanding();
  void land(int tensor);
  void finishTickets();
  void finishRankOrder();
  void finishCounters();

  DispatchRequest request_;
  std::vector<Tensor> tensors_;
  std::vector<SourceRows> sources_;  // what extraction reads, by tensor
  std::vector<std::byte*> landing_;  // where this rank's rows arrive: output or a library window
  std::uint32_t flags_ = 0;          // what this rank has announced
  bool recording_ = false;
  bool underWay_ = false;
  bool castOnTheWay_ = false;
  Placer placer_;
  std::size_t at_ = 0;  // next copy of the own flow
  std::vector<StreamOut> out_;
  struct Arriving {
    bool open = false;  // the oldest slice is on its way to its rows
    bool last = false;  // and the last
  };
  std::vector<Arriving> arriving_;  // by stream in
  // By stream in: of a slice whose payload is on its way to its rows, where they are.
  std::vector<std::vector<transport::Segment>> scattering_;
  std::vector<transport::Segment> places_;
  std::vector<ArrivalClock> arrivals_;  // by stream in
};

}  // namespace fusco::engine
