// Plan, dispatch and combine captured in a CUDA graph: replayed with a new routing map, new weights and a new number of
// tokens each time. That all of it can be captured also shows that no call waits for the GPU. Ranks are on all GPUs of
// the machine, and the streams of these in one capture.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <sstream>

#include "gpu/space.h"

namespace fusco::test {
namespace {

constexpr int kRanks = 8;
constexpr int kReplays = 25;

// One rank's tensors.
struct Tensors {
  Tensors(GpuSpace& space, std::size_t most, std::size_t topk, std::size_t rowBytes, std::size_t rows)
      : tokens(space, 8),
        ids(space, most * topk * 8),
        weights(space, most * topk * 4),
        input(space, most * rowBytes),
        output(space, rows * rowBytes),
        combined(space, most * rowBytes) {}
  GpuBytes tokens, ids, weights, input, output, combined;
};

class GraphRun {
 public:
  GraphRun(std::uint64_t seed, const std::vector<fuscoComm_t>& comms);
  ~GraphRun();
  GraphRun(const GraphRun&) = delete;
  GraphRun& operator=(const GraphRun&) = delete;
  std::string replay();

 private:
  std::int64_t pick(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
  }
  std::size_t rowsOf(int rank) const;
  void capture();
  void newRouting();
  std::string check(int rank);
  std::string checkCombined(int rank, const std::vector<Expected>& all);
  GpuSpace& spaceOf(int rank) { return *spaces_[static_cast<std::size_t>(gpuOfRank(rank, kRanks))]; }
  void settle() {
    for (const auto& space : spaces_) space->settle();
  }
  // All streams after the first one, and the other way round.
  void fork();
  void join();

  const std::vector<fuscoComm_t>& comms_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<GpuSpace>> spaces_;  // by GPU
  std::vector<cudaEvent_t> events_;                // the same
  Case c_;
  std::int64_t most_ = 0;
  std::vector<std::unique_ptr<Tensors>> tensors_;
  std::vector<fuscoPlan_t> plans_;
  cudaGraphExec_t graph_ = nullptr;
};

GraphRun::GraphRun(std::uint64_t seed, const std::vector<fuscoComm_t>& comms) : comms_(comms), random_(seed) {
  static constexpr int kLayouts[] = {fuscoLayoutSlotted, fuscoLayoutExpertOrder, fuscoLayoutRankOrder};
  c_.seed = seed;
  c_.ranks = kRanks;
  c_.experts = static_cast<int>(pick(1, 40));
  c_.topk = static_cast<int>(pick(1, 8));
  c_.layout = kLayouts[seed / 1000 % 3];
  c_.rowBytes = static_cast<std::size_t>(4 * pick(1, 400));
  most_ = pick(1, pick(0, 3) == 0 ? 300 : 30);
  if (c_.layout == fuscoLayoutSlotted) {
    c_.maxTokens = most_;
  } else {
    c_.capacityRows = pick(1, most_ * c_.topk * 2);
    if (c_.layout == fuscoLayoutExpertOrder) c_.alignment = static_cast<int>(pick(1, 8));
    c_.zeroFill = 1;
  }
  plans_.assign(kRanks, nullptr);
  for (int gpu = 0; gpu <= gpuOfRank(kRanks - 1, kRanks); ++gpu) {
    CUDA_OK(cudaSetDevice(gpu));
    spaces_.push_back(std::make_unique<GpuSpace>());
    events_.push_back(nullptr);
    CUDA_OK(cudaEventCreateWithFlags(&events_.back(), cudaEventDisableTiming));
  }
  CUDA_OK(cudaSetDevice(0));
  for (int r = 0; r < kRanks; ++r) {
    tensors_.push_back(std::make_unique<Tensors>(spaceOf(r), static_cast<std::size_t>(most_),
                                                 static_cast<std::size_t>(c_.topk), c_.rowBytes, rowsOf(r)));
  }
  newRouting();
  capture();
}

GraphRun::~GraphRun() {
  for (const auto& space : spaces_) cudaStreamSynchronize(space->stream());
  if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  for (const fuscoPlan_t plan : plans_) fuscoPlanDestroy(plan);
  for (const cudaEvent_t event : events_) cudaEventDestroy(event);
}

void GraphRun::fork() {
  CUDA_OK(cudaEventRecord(events_[0], spaces_[0]->stream()));
  for (std::size_t gpu = 1; gpu < spaces_.size(); ++gpu)
    CUDA_OK(cudaStreamWaitEvent(spaces_[gpu]->stream(), events_[0], 0));
}

void GraphRun::join() {
  for (std::size_t gpu = 1; gpu < spaces_.size(); ++gpu) {
    CUDA_OK(cudaSetDevice(static_cast<int>(gpu)));
    CUDA_OK(cudaEventRecord(events_[gpu], spaces_[gpu]->stream()));
    CUDA_OK(cudaStreamWaitEvent(spaces_[0]->stream(), events_[gpu], 0));
  }
  CUDA_OK(cudaSetDevice(0));
}

std::size_t GraphRun::rowsOf(int rank) const {
  if (c_.layout != fuscoLayoutSlotted) return static_cast<std::size_t>(c_.capacityRows);
  return static_cast<std::size_t>(c_.localExperts(rank) * kRanks * c_.maxTokens);
}

void GraphRun::newRouting() {
  c_.tokens.clear();
  c_.ids.clear();
  c_.weights.clear();
  const int style = static_cast<int>(pick(0, 3));
  for (int r = 0; r < kRanks; ++r) {
    const std::int64_t tokens = pick(0, most_);
    std::vector<std::int64_t> ids;
    std::vector<float> weights;
    for (std::int64_t i = 0; i < tokens * c_.topk; ++i) {
      const std::int64_t id = style == 0 ? c_.experts - 1 : pick(style == 1 ? -1 : 0, c_.experts - 1);
      ids.push_back(id);
      weights.push_back(static_cast<float>(pick(-100, 100)) / 77.0f);
    }
    Tensors& t = *tensors_[static_cast<std::size_t>(r)];
    std::memcpy(t.tokens.here.data(), &tokens, 8);
    if (!ids.empty()) {
      std::memcpy(t.ids.here.data(), ids.data(), ids.size() * 8);
      std::memcpy(t.weights.here.data(), weights.data(), weights.size() * 4);
    }
    for (std::int64_t token = 0; token < tokens; ++token) {
      auto* row = t.input.here.data() + static_cast<std::size_t>(token) * c_.rowBytes;
      for (std::size_t i = 0; i < c_.rowBytes / 4; ++i) {
        const float x = static_cast<float>(pick(-1000, 1000)) / 37.0f;
        std::memcpy(row + 4 * i, &x, 4);
      }
    }
    std::fill(t.output.here.begin(), t.output.here.end(), std::uint8_t{0xa5});
    t.tokens.send(), t.ids.send(), t.weights.send(), t.input.send(), t.output.send();
    c_.tokens.push_back(tokens);
    c_.ids.push_back(std::move(ids));
    c_.weights.push_back(std::move(weights));
  }
}

void GraphRun::capture() {
  settle();
  const cudaStream_t first = spaces_[0]->stream();
  CUDA_OK(cudaStreamBeginCapture(first, cudaStreamCaptureModeGlobal));
  fork();
  FUSCO_OK(fuscoGroupStart());
  for (std::size_t r = 0; r < kRanks; ++r) {
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = tensors_[r]->ids.there();
    config.weights = static_cast<const float*>(tensors_[r]->weights.there());
    config.tokens = most_;
    config.tokensOnDevice = static_cast<const std::int64_t*>(tensors_[r]->tokens.there());
    config.topk = c_.topk;
    config.experts = c_.experts;
    config.layout = c_.layout;
    config.alignment = c_.alignment;
    config.zeroFill = c_.zeroFill;
    config.maxTokens = c_.maxTokens;
    config.capacityRows = c_.capacityRows;
    config.capacityPolicy = fuscoCapacityDrop;
    config.tickets = 1;
    config.expertCounters = c_.seed / 3000 % 2 == 0;
    FUSCO_OK(fuscoPlanCreate(&plans_[r], &config, comms_[r], spaceOf(static_cast<int>(r)).stream()));
  }
  FUSCO_OK(fuscoGroupEnd());
  FUSCO_OK(fuscoGroupStart());
  for (std::size_t r = 0; r < kRanks; ++r) {
    FUSCO_OK(fuscoDispatch(plans_[r], tensors_[r]->input.there(), tensors_[r]->output.there(), c_.rowBytes,
                           spaceOf(static_cast<int>(r)).stream()));
  }
  FUSCO_OK(fuscoGroupEnd());
  FUSCO_OK(fuscoGroupStart());
  for (std::size_t r = 0; r < kRanks; ++r) {
    FUSCO_OK(fuscoCombine(plans_[r], tensors_[r]->output.there(), tensors_[r]->combined.there(), c_.rowBytes / 4,
                          fuscoFloat32, spaceOf(static_cast<int>(r)).stream()));
  }
  FUSCO_OK(fuscoGroupEnd());
  cudaGraph_t captured = nullptr;
  join();
  CUDA_OK(cudaStreamEndCapture(first, &captured));
  const cudaError_t error = cudaGraphInstantiate(&graph_, captured, 0);
  cudaGraphDestroy(captured);
  CUDA_OK(error);
}

std::string GraphRun::replay() {
  newRouting();
  settle();
  CUDA_OK(cudaGraphLaunch(graph_, spaces_[0]->stream()));
  settle();
  for (int r = 0; r < kRanks; ++r) {
    const std::string wrong = check(r);
    if (!wrong.empty()) return c_.describe() + "; rank " + std::to_string(r) + ": " + wrong;
  }
  std::vector<Expected> all;
  for (int r = 0; r < kRanks; ++r) all.push_back(expectedAt(c_, r));
  for (int r = 0; r < kRanks; ++r) {
    const std::string wrong = checkCombined(r, all);
    if (!wrong.empty()) return c_.describe() + "; rank " + std::to_string(r) + ": " + wrong;
  }
  return "";
}

std::string GraphRun::check(int rank) {
  const Expected expected = expectedAt(c_, rank);
  const auto at = static_cast<std::size_t>(rank);
  Tensors& t = *tensors_[at];
  t.output.fetch();
  std::ostringstream wrong;
  const std::size_t held = rowsOf(rank);
  const fuscoTicket_t* there = nullptr;
  FUSCO_OK(fuscoPlanTickets(plans_[at], &there));
  std::vector<fuscoTicket_t> tickets(held);
  if (held > 0) spaceOf(rank).read(tickets.data(), there, held * sizeof(fuscoTicket_t));
  std::vector<char> written(held, 0);
  for (const Arrival& a : expected.arrivals) {
    const auto row = static_cast<std::size_t>(a.row);
    written[row] = 1;
    const auto* source = tensors_[static_cast<std::size_t>(a.source)]->input.here.data() +
                         static_cast<std::size_t>(a.token) * c_.rowBytes;
    if (std::memcmp(t.output.here.data() + row * c_.rowBytes, source, c_.rowBytes) != 0)
      wrong << "row " << row << " is not that of rank " << a.source << " token " << a.token << "; ";
    if (tickets[row].source != a.source || tickets[row].token != a.token || tickets[row].slot != a.slot)
      wrong << "ticket of row " << row << "; ";
  }
  for (std::size_t row = 0; row < held; ++row) {
    if (written[row]) continue;
    if (tickets[row].source != -1) wrong << "a ticket for row " << row << ", where no row belongs; ";
    const bool gap = c_.alignment > 1 && static_cast<std::int64_t>(row) < expected.rows;
    if (t.output.here[row * c_.rowBytes] != (gap ? 0 : 0xa5)) wrong << "row " << row << " was written; ";
  }
  if (c_.layout == fuscoLayoutSlotted || (c_.layout == fuscoLayoutExpertOrder && c_.seed / 3000 % 2 == 0)) {
    const volatile std::uint64_t* counters = nullptr;
    FUSCO_OK(fuscoPlanExpertCounters(plans_[at], &counters));
    std::vector<std::uint64_t> counted(expected.rowsOfExpert.size());
    if (!counted.empty())
      spaceOf(rank).read(counted.data(), const_cast<const std::uint64_t*>(counters), counted.size() * 8);
    for (std::size_t e = 0; e < counted.size(); ++e) {
      if (counted[e] != static_cast<std::uint64_t>(expected.rowsOfExpert[e]))
        wrong << "counter of expert " << e << " is " << counted[e] << ", expected " << expected.rowsOfExpert[e] << "; ";
    }
  }
  return wrong.str().substr(0, 400);
}

// Each row came back as it had arrived: the sum of the weights of what was kept, by rank, then slot.
std::string GraphRun::checkCombined(int rank, const std::vector<Expected>& all) {
  const auto at = static_cast<std::size_t>(rank);
  Tensors& t = *tensors_[at];
  t.combined.fetch();
  const auto topk = static_cast<std::size_t>(c_.topk);
  std::vector<int> rankOfSlot(static_cast<std::size_t>(c_.tokens[at]) * topk, -1);
  for (int r = 0; r < kRanks; ++r) {
    for (const Arrival& a : all[static_cast<std::size_t>(r)].arrivals) {
      if (a.source == rank) rankOfSlot[static_cast<std::size_t>(a.token) * topk + static_cast<std::size_t>(a.slot)] = r;
    }
  }
  const bool weighted = c_.layout != fuscoLayoutRankOrder;
  for (std::size_t token = 0; token < static_cast<std::size_t>(c_.tokens[at]); ++token) {
    for (std::size_t i = 0; i < c_.rowBytes / 4; ++i) {
      float x, got, sum = 0;
      std::memcpy(&x, t.input.here.data() + token * c_.rowBytes + 4 * i, 4);
      std::memcpy(&got, t.combined.here.data() + token * c_.rowBytes + 4 * i, 4);
      for (int r = 0; r < kRanks; ++r) {
        for (std::size_t k = 0; k < topk; ++k) {
          if (rankOfSlot[token * topk + k] == r)
            sum = std::fmaf(weighted ? c_.weights[at][token * topk + k] : 1.0f, x, sum);
        }
      }
      if (got != sum) {
        std::ostringstream wrong;
        wrong << "combine of token " << token << " element " << i << " is " << got << ", expected " << sum;
        return wrong.str();
      }
    }
  }
  return "";
}

class GpuGraph : public GpuTest {};

TEST_F(GpuGraph, AReplayShufflesWhatIsThere) {
  const Cases some(12, 900);
  const std::vector<fuscoComm_t> comms = gpuComms(kRanks);
  std::string wrong;
  for (std::int64_t i = 0; i < some.count && wrong.empty(); ++i) {
    GraphRun run(some.seed(i), comms);
    for (int k = 0; k < kReplays && wrong.empty(); ++k) wrong = run.replay();
  }
  EXPECT_EQ(wrong, "");
  for (const fuscoComm_t comm : comms) FUSCO_OK(fuscoCommDestroy(comm));
}

}  // namespace
}  // namespace fusco::test
