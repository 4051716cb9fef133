// Threads of the library.
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "base/status.h"

namespace fusco {

// A thread that runs `body`, or systemError: what there was none for, and which limit to raise.
template <class Body>
std::thread startThread(const std::string& purpose, Body&& body) {
  try {
    return std::thread(std::forward<Body>(body));
  } catch (const std::system_error& error) {
    fail(Code::systemError, noThreadText(purpose, error.what()));
  }
}

}  // namespace fusco
