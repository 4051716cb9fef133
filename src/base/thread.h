// Threads of the library and of libfusco.
#pragma once

#include <pthread.h>

#include <atomic>
#include <exception>
#include <functional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/status.h"

namespace fusco {

// What is said where no thread can be had.
inline std::string noThreadText(const std::string& purpose, const std::string& why) {
  return "no thread can be started for " + purpose + ": " + why +
         "; raise `ulimit -u`, or the limit of processes of the container";
}

// Whether this thread is one that this shared object has started: nobody else's code runs on it, or comes to find what
// it had set there. (What libfusco starts is a caller's for the library.)
inline bool& isOwnThread() {
  thread_local bool is = false;
  return is;
}

// A thread that runs `body`, or systemError: what there was none for, and which limit to raise.
template <class Body>
std::thread startThread(const std::string& purpose, Body&& body) {
  try {
    return std::thread([run = std::forward<Body>(body)]() mutable {
      isOwnThread() = true;
      run();
    });
  } catch (const std::system_error& error) {
    fail(Code::systemError, noThreadText(purpose, error.what()));
  }
}

// Runs all jobs side by side, each on a thread of its own, and throws the first error in their order. They wait for
// each other, for minutes where one is missing: none begins before there is a thread for each, and none at all where
// there is not.
inline void runTogether(const std::string& purpose, const std::vector<std::function<void()>>& jobs) {
  std::vector<std::exception_ptr> errors(jobs.size());
  enum class Gate { closed, open, givenUp };
  std::atomic<Gate> gate{Gate::closed};
  std::vector<std::thread> threads;
  threads.reserve(jobs.size());
  std::exception_ptr shortage;
  try {
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      threads.push_back(startThread(purpose, [&, i] {
        gate.wait(Gate::closed);
        if (gate == Gate::givenUp) return;
        try {
          jobs[i]();
        } catch (...) {
          errors[i] = std::current_exception();
        }
      }));
    }
  } catch (...) {
    shortage = std::current_exception();
  }
  gate = shortage ? Gate::givenUp : Gate::open;
  gate.notify_all();
  for (std::thread& thread : threads) thread.join();
  if (shortage) std::rethrow_exception(shortage);
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// From now on no process forks while a thread holds the mutex that `mutexOf` returns: the child may take it.
template <auto mutexOf>
void holdAtForks() {
  static const int registered =
      ::pthread_atfork([] { mutexOf().lock(); }, [] { mutexOf().unlock(); }, [] { mutexOf().unlock(); });
  static_cast<void>(registered);
}

// This thread's T, one for each Purpose. Static objects may call at their end, when the main thread's own variables are
// gone: they get one that stays.
template <typename T, typename Purpose>
T& ofThisThread() {
  thread_local T* own = nullptr;
  struct End {
    ~End() { delete std::exchange(own, nullptr); }
  };
  if (own == nullptr) {
    thread_local End end;
    own = new T;
  }
  return *own;
}

}  // namespace fusco
