// A thread that looks after the other ranks while nobody calls the engine: where kernels wait for GPUs of other
// processes, somebody has to tell them that such a process has died.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

namespace fusco::engine {

class Engine;

class Watch {
 public:
  // Until the engine is broken, or this object ends.
  explicit Watch(Engine& engine);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

 private:
  void run();

  Engine& engine_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace fusco::engine
