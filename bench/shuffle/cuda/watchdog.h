// Ends the program when a step takes too long: a call that waits for a GPU cannot be interrupted otherwise.
#pragma once

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>

namespace fusco::bench::gpu {

class Watchdog {
 public:
  explicit Watchdog(int seconds);
  ~Watchdog();
  // A new step begins.
  void step(const std::string& what);

 private:
  void watch();

  const int seconds_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::string what_;
  long turn_ = 0;
  bool leave_ = false;
  std::thread thread_;
};

}  // namespace fusco::bench::gpu
