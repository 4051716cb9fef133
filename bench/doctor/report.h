// What the doctor has found: one line for each check.
#pragma once

#include <functional>
#include <string>
#include <vector>

namespace fusco::bench::doctor {

// pass: fine, or not there and not needed. warn: a run works, but slower or in fewer places. fail: a run will end
// there.
enum class Status { pass, warn, fail };

struct Finding {
  Status status;
  std::string check;
  std::string found;
  std::string mend;  // a command or a sentence; "" if nothing is to be mended
};

class Report {
 public:
  // `root` stands in front of /proc and /sys: for tests.
  explicit Report(std::string root) : root_(std::move(root)) {}

  void pass(const std::string& check, const std::string& found) { add({Status::pass, check, found, ""}); }
  void warn(const std::string& check, const std::string& found, const std::string& mend) {
    add({Status::warn, check, found, mend});
  }
  void fail(const std::string& check, const std::string& found, const std::string& mend) {
    add({Status::fail, check, found, mend});
  }
  int count(Status status) const;
  std::string text() const;
  std::string json() const;

  // The first line of a file under the root; "" if it cannot be read.
  std::string line(const std::string& path) const;
  // Names in a folder under the root, sorted.
  std::vector<std::string> names(const std::string& folder) const;

 private:
  void add(Finding finding) { findings_.push_back(std::move(finding)); }

  const std::string root_;
  std::vector<Finding> findings_;
};

// A setting of the library, by its FUSCO_ name. Asked in a process of its own, since a process reads its settings once.
std::string setting(const char* name);
// Runs body in a process of its own, which it leaves with its text; "" is well. At most `seconds`.
std::string apart(int seconds, const std::function<std::string()>& body);

void checkSettings(Report& report);
void checkMachine(Report& report);
void checkNetwork(Report& report);
void checkGpus(Report& report);
void checkRdma(Report& report);
void checkGpuMemory(Report& report);  // whether RDMA devices can register it
void checkNccl(Report& report);
// An RDMA port that is up, and not switched off.
bool hasActivePort(const Report& report);
// Whole shuffles between processes of this machine.
void checkTrials(Report& report);

}  // namespace fusco::bench::doctor
