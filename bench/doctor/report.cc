#include "doctor/report.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "fusco/fusco.h"

namespace fusco::bench::doctor {

namespace {
const char* nameOf(Status status) { return status == Status::pass ? "PASS" : status == Status::warn ? "WARN" : "FAIL"; }
}  // namespace

int Report::count(Status status) const {
  return static_cast<int>(std::count_if(findings_.begin(), findings_.end(),
                                        [&](const Finding& finding) { return finding.status == status; }));
}

std::string Report::text() const {
  std::string all;
  for (const Finding& f : findings_) {
    all += fmt::format("{}  {:<18}  {}\n", nameOf(f.status), f.check, f.found);
    if (!f.mend.empty()) all += fmt::format("      {:<18}  mend: {}\n", "", f.mend);
  }
  return all + fmt::format("{} passed, {} warnings, {} failed\n", count(Status::pass), count(Status::warn),
                           count(Status::fail));
}

std::string Report::json() const {
  nlohmann::json all = nlohmann::json::array();
  for (const Finding& f : findings_) {
    all.push_back({{"status", nameOf(f.status)}, {"check", f.check}, {"found", f.found}, {"mend", f.mend}});
  }
  return all.dump(2) + "\n";
}

std::string Report::line(const std::string& path) const {
  std::ifstream file(root_ + path);
  std::string text;
  std::getline(file, text);
  return text;
}

std::vector<std::string> Report::names(const std::string& folder) const {
  std::vector<std::string> all;
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(root_ + folder, none))
    all.push_back(entry.path().filename());
  std::sort(all.begin(), all.end());
  return all;
}

std::string setting(const char* name) {
  return apart(5, [name]() -> std::string {
    setenv("FUSCO_DEBUG", "NONE", 1);
    const char* value = "";
    return fuscoGetSetting(name, &value) == fuscoSuccess ? value : "";
  });
}

std::string apart(int seconds, const std::function<std::string()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child < 0) return "no process";
  if (child == 0) {
    close(ends[0]);
    setpgid(0, 0);
    std::string text;
    try {
      text = body();
    } catch (const std::exception& error) {
      text = error.what();
    }
    const ssize_t written = write(ends[1], text.data(), text.size());
    _exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }
  close(ends[1]);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::seconds(seconds);
  std::string text;
  bool open = true;
  while (open && Clock::now() < end) {
    pollfd readable{ends[0], POLLIN, 0};
    if (poll(&readable, 1, 100) <= 0) continue;
    char buffer[1024];
    const ssize_t got = read(ends[0], buffer, sizeof buffer);
    if (got > 0) text.append(buffer, static_cast<std::size_t>(got));
    open = got > 0;
  }
  close(ends[0]);
  // With what it may have started itself.
  if (open) kill(-child, SIGKILL);
  if (open) kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  if (open) return fmt::format("nothing within {} s", seconds);
  if (WIFSIGNALED(status)) return fmt::format("ended by signal {}", WTERMSIG(status));
  return status == 0 ? text : "no answer";
}

}  // namespace fusco::bench::doctor
