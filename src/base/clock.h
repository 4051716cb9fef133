// Monotonic time, and points in it by which something must have happened.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ctime>

namespace fusco {

inline std::int64_t nowNs() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<std::int64_t>(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

// For how long something has been so, without a break.
class Lasting {
 public:
  // Whether it is so now. Returns for how many nanoseconds it has been.
  std::int64_t note(bool so) {
    if (!so) {
      sinceNs_ = 0;
      return 0;
    }
    const std::int64_t now = nowNs();
    if (sinceNs_ == 0) sinceNs_ = now;
    return now - sinceNs_;
  }

 private:
  std::int64_t sinceNs_ = 0;  // 0: it is not
};

// A point in time, or never. A value: pass it down and every wait below shares one budget.
class Deadline {
 public:
  static constexpr std::int64_t kNever = INT64_MAX;

  static Deadline never() { return Deadline(kNever); }
  static Deadline afterNs(std::int64_t ns) {
    const std::int64_t now = nowNs();
    return Deadline(ns > kNever - now ? kNever : now + ns);
  }
  // As the settings have it: 0 or less means no limit.
  static Deadline afterMs(std::int64_t ms) {
    return ms <= 0 || ms > kNever / 1'000'000 ? never() : afterNs(ms * 1'000'000);
  }

  bool isNever() const { return at_ == kNever; }
  bool passed() const { return !isNever() && nowNs() >= at_; }
  // Nanoseconds left, never negative; kNever without a limit.
  std::int64_t leftNs() const { return isNever() ? kNever : std::max<std::int64_t>(0, at_ - nowNs()); }
  // For poll(2): milliseconds rounded up, -1 without a limit.
  int leftMs() const {
    if (isNever()) return -1;
    return static_cast<int>(std::min<std::int64_t>((leftNs() + 999'999) / 1'000'000, INT32_MAX));
  }
  Deadline earlier(Deadline other) const { return Deadline(std::min(at_, other.at_)); }

 private:
  explicit Deadline(std::int64_t at) : at_(at) {}
  std::int64_t at_;
};

}  // namespace fusco
