// The backward of a weighted combine: gradients to the experts, each scaled by its weight, and K router-weight
// gradients a token by dot products taken where the expert rows lie. Goes the way of a dispatch; the dots come home
// along its streams.
#pragma once

#include <vector>

#include "engine/placer.h"
#include "engine/shuffle_operation.h"
#include "engine/stream_io.h"

namespace fusco::engine {

class CombineBackward : public ShuffleOperation {
 public:
  CombineBackward(Engine& engine, std::shared_ptr<PlanState> plan, const CombineBackwardRequest& request);

 protected:
  void reset() override;
  Outcome run(const Step& step) override;

 private:
  Outcome announceReady();
  Outcome bindPeers();
  Outcome put();
  Outcome extract(std::size_t stream);
  Outcome place(std::size_t stream);
  Outcome sendBack(std::size_t stream);
  Outcome receiveBack(std::size_t stream);
  Outcome finish();
  // Scales, writes and multiplies the rows of some copies; dots are added beside the entries.
  void back(const exec::PlaceArgs& rows, const float* weights, std::size_t rowOffset, float* dots);
  void backByVm(const exec::PlaceArgs& rows, const float* weights, std::size_t rowOffset, int localIndex, float* dots);

  CombineBackwardRequest request_;
  std::size_t rowBytes_ = 0;
  bool staged_ = false;
  std::byte* landing_ = nullptr;
  const std::byte* expertRows_ = nullptr;
  Placer placer_;
  std::size_t at_ = 0;
  std::vector<StreamOut> out_;
  std::vector<float> ownDots_;
  float* weightGradient_ = nullptr;     // where the host writes it
  std::vector<float> broughtGradient_;  // on GPUs: from here it goes to the caller's
  struct StreamDots {
    std::vector<float> dots;  // beside the entries of a stream in, in order of arrival
    std::size_t entries = 0;  // that have arrived
    std::size_t sent = 0;
  };
  std::vector<StreamDots> dots_;
  struct Home {
    std::size_t flow = 0;  // of the stream's flows
    std::size_t copy = 0;
    std::size_t entry = 0;
  };
  std::vector<Home> home_;
  std::vector<std::byte*> rowBases_, expertBases_;
};

}  // namespace fusco::engine
