// What goes wrong while ranks shuffle in the soft-RoCE machine: commands that a process beside them runs, once they are
// well under way.
#pragma once

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "base/clock.h"

namespace fusco::test {

class Sabotage {
 public:
  // Made before the ranks are. The fault lasts `lastsMs` from when the command has ended; `after` is for when the ranks
  // have, and leaves the machine as it was.
  Sabotage(const std::string& command, int lastsMs, std::string after) : after_(std::move(after)) {
    void* const memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("mmap");
    shared_ = new (memory) Shared{};
    child_ = fork();
    if (child_ != 0) return;
    while (shared_->go == 0) usleep(1000);
    const int status = std::system(command.c_str());
    shared_->beganNs = nowNs();
    usleep(static_cast<useconds_t>(lastsMs) * 1000);
    shared_->endedNs = nowNs();
    _exit(status == 0 ? 0 : 1);
  }
  // Whether the command did what it should.
  bool end() {
    int status = 1;
    const Deadline deadline = Deadline::afterMs(10000);
    while (waitpid(child_, &status, WNOHANG) == 0 && !deadline.passed()) usleep(1000);
    if (deadline.passed()) {
      kill(child_, SIGKILL);
      waitpid(child_, &status, 0);
      status = 1;
    }
    child_ = 0;
    const bool mended = after_.empty() || std::system(after_.c_str()) == 0;
    return status == 0 && mended;
  }
  ~Sabotage() {
    if (child_ != 0) kill(child_, SIGKILL);
    munmap(shared_, sizeof(Shared));
  }

  // By any rank.
  void go() { shared_->go = 1; }
  std::int64_t msSinceBegin() const { return shared_->beganNs == 0 ? -1 : (nowNs() - shared_->beganNs) / 1'000'000; }
  std::int64_t msSinceEnd() const { return shared_->endedNs == 0 ? -1 : (nowNs() - shared_->endedNs) / 1'000'000; }

 private:
  struct Shared {
    std::atomic<int> go{0};
    std::atomic<std::int64_t> beganNs{0};
    std::atomic<std::int64_t> endedNs{0};
  };
  Shared* shared_ = nullptr;
  pid_t child_ = -1;
  std::string after_;
};

}  // namespace fusco::test
