// fusco_doctor: what a run will need, whether it is there, and the line that mends it.
#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "doctor/report.h"
#include "flags.h"
#include "fusco/fusco.h"

int main(int count, char** arguments) {
  using namespace fusco::bench::doctor;
  fusco::bench::Flags flags(
      "fusco_doctor",
      "Checks what FUSCO will need on this machine, as this user, with these settings, and prints PASS, WARN or FAIL "
      "with the line that mends it. Ends with 1 if something failed");
  bool json = false;
  std::string root;
  flags.add("--json", json, "an array of {status, check, found, mend}");
  flags.add("--root", root, "tests only: stands in front of /proc and /sys");
  int exitCode = 0;
  if (!flags.parse({arguments, arguments + count}, &exitCode)) return exitCode;

  Report report(root);
  int version = 0;
  fuscoGetVersion(&version);
  report.pass("FUSCO", fmt::format("{}.{}.{}, device {}", version / 10000, version / 100 % 100, version % 100,
                                   setting("FUSCO_DEVICE")));
  checkSettings(report);
  checkMachine(report);
  checkNetwork(report);
  checkRdma(report);
  checkGpus(report);
  checkNccl(report);
  checkTrials(report);
  const std::string text = json ? report.json() : report.text();
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    fmt::print(stderr, "fusco_doctor: cannot write to standard output: {}\n", std::strerror(errno));
    return 1;
  }
  return report.count(Status::fail) == 0 ? 0 : 1;
}
