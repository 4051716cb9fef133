// Starts a program as a shell would and keeps what it says.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <string>

struct Said {
  int code;
  std::string text;  // both streams
};

inline Said say(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  Said said{-1, ""};
  if (pipe == nullptr) return said;
  char buffer[4096];
  for (std::size_t n; (n = std::fread(buffer, 1, sizeof buffer, pipe)) > 0;) said.text.append(buffer, n);
  int status = pclose(pipe);
  said.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return said;
}

inline std::string temporary(const std::string& name) {
  return testing::TempDir() + name + "_" + std::to_string(getpid());
}
