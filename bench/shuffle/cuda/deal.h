// How ranks are dealt to GPUs, and a thread for each rank where ranks call side by side. Needs no GPU.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace fusco::bench::gpu {

// GPUs that ranks are dealt to in blocks: 0 wanted means as many as there are, at most one a rank.
int gpusFor(int wanted, int present, int ranks);
int gpuOfRank(int rank, int ranks, int gpus);
// Of a GPU's budget of multiprocessors, this rank's part; the first ranks of a GPU get one more. 0: the budget is too
// small for its ranks.
int smsOfRank(int sms, int rank, int ranks, int gpus);

// Where a rank's rows lie in its GPU's memory, in rows.
struct Place {
  std::int64_t first = 0, rows = 0;
};
// Rows of several ranks of a GPU one behind the other, each rank's first at a multiple of 256 bytes. `all`: rows of
// each GPU.
std::vector<Place> placesOf(const std::vector<std::int64_t>& rows, std::size_t rowBytes, int gpus,
                            std::vector<std::int64_t>& all);

// Threads that wait for work: one a rank.
class Workers {
 public:
  explicit Workers(int count);
  ~Workers();
  // body(i) on thread i, for all i side by side; throws the first failure when all have ended.
  void each(const std::function<void(int)>& body);

 private:
  void serve(int index);

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::uint64_t turn_ = 0;
  int left_ = 0;
  bool leave_ = false;
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::exception_ptr> failures_;
  std::vector<std::thread> threads_;
};

}  // namespace fusco::bench::gpu
