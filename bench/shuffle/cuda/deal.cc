#include "shuffle/cuda/deal.h"

#include <algorithm>
#include <numeric>

namespace fusco::bench::gpu {

int gpusFor(int wanted, int present, int ranks) {
  const int most = std::min(present, ranks);
  return wanted == 0 ? most : std::min(wanted, most);
}

int gpuOfRank(int rank, int ranks, int gpus) { return static_cast<int>(static_cast<long long>(rank) * gpus / ranks); }

int smsOfRank(int sms, int rank, int ranks, int gpus) {
  int before = 0, count = 0;
  for (int r = 0; r < ranks; ++r) {
    if (gpuOfRank(r, ranks, gpus) != gpuOfRank(rank, ranks, gpus)) continue;
    before += r < rank;
    ++count;
  }
  return sms / count + (before < sms % count ? 1 : 0);
}

std::vector<Place> placesOf(const std::vector<std::int64_t>& rows, std::size_t rowBytes, int gpus,
                            std::vector<std::int64_t>& all) {
  const auto unit = static_cast<std::int64_t>(256 / std::gcd(std::size_t{256}, rowBytes));
  all.assign(static_cast<std::size_t>(gpus), 0);
  std::vector<Place> places;
  for (std::size_t r = 0; r < rows.size(); ++r) {
    std::int64_t& next =
        all[static_cast<std::size_t>(gpuOfRank(static_cast<int>(r), static_cast<int>(rows.size()), gpus))];
    places.push_back({next, rows[r]});
    next += (rows[r] + unit - 1) / unit * unit;
  }
  return places;
}

Workers::Workers(int count) : failures_(static_cast<std::size_t>(count)) {
  for (int i = 0; i < count; ++i) threads_.emplace_back([this, i] { serve(i); });
}

Workers::~Workers() {
  {
    std::lock_guard lock(mutex_);
    leave_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Workers::each(const std::function<void(int)>& body) {
  std::unique_lock lock(mutex_);
  body_ = &body;
  left_ = static_cast<int>(threads_.size());
  std::fill(failures_.begin(), failures_.end(), nullptr);
  ++turn_;
  wake_.notify_all();
  done_.wait(lock, [&] { return left_ == 0; });
  for (const std::exception_ptr& failure : failures_)
    if (failure) std::rethrow_exception(failure);
}

void Workers::serve(int index) {
  std::unique_lock lock(mutex_);
  for (std::uint64_t seen = 0;;) {
    wake_.wait(lock, [&] { return leave_ || turn_ != seen; });
    if (leave_) return;
    seen = turn_;
    const std::function<void(int)>& body = *body_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      body(index);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    failures_[static_cast<std::size_t>(index)] = failure;
    if (--left_ == 0) done_.notify_all();
  }
}

}  // namespace fusco::bench::gpu
