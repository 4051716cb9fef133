// What every run needs of the machine and of the process's limits.
#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>

#include "doctor/report.h"
#include "fusco/fusco.h"

namespace fusco::bench::doctor {

namespace {

constexpr double kGiB = 1 << 30;

void checkCores(Report& report) {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 0;
  report.pass("cores", fmt::format("{} for this process", cores));
}

void checkMemory(Report& report) {
  const double pages = static_cast<double>(sysconf(_SC_AVPHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  std::string found = fmt::format("{:.1f} GiB free", pages / kGiB);
  const std::string bound = report.line("/sys/fs/cgroup/memory.max");
  if (!bound.empty() && bound != "max")
    found += fmt::format(", at most {:.1f} GiB for this group", std::atof(bound.c_str()) / kGiB);
  report.pass("memory", found);

  const int descriptor = memfd_create("fusco doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  const std::size_t bytes = 1 << 20;
  void* const memory = descriptor >= 0 && ftruncate(descriptor, static_cast<off_t>(bytes)) == 0
                           ? mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
                           : MAP_FAILED;
  if (memory == MAP_FAILED) {
    report.fail("shared memory", fmt::format("memfd_create and mmap: {}", std::strerror(errno)),
                "allow memfd_create in the container's seccomp profile");
  } else {
    report.pass("shared memory", "memfd_create works");
    munmap(memory, bytes);
  }
  if (descriptor >= 0) close(descriptor);
}

void checkHugePages(Report& report) {
  const std::string file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
  const std::string text = report.line(file);
  const std::size_t open = text.find('['), end = text.find(']');
  if (open == std::string::npos || end == std::string::npos) return report.pass("huge pages", "none in this kernel");
  const std::string chosen = text.substr(open + 1, end - open - 1);
  if (chosen == "never" || chosen == "deny") {
    return report.warn("huge pages", "shared memory has small pages only (" + chosen + ")", "echo advise > " + file);
  }
  report.pass("huge pages", "for shared memory: " + chosen);
}

void checkFiles(Report& report) {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  const auto text = [](rlim_t value) { return value == RLIM_INFINITY ? "unlimited" : std::to_string(value); };
  // Sockets, descriptors of memory and a handle on each peer's process: a few for each rank of the machine, and a job
  // has other files too.
  if (limit.rlim_cur < 1024) {
    return report.warn("open files", text(limit.rlim_cur) + " at most",
                       limit.rlim_max < 1024 ? "raise nofile in /etc/security/limits.conf, LimitNOFILE of the service"
                                             : "ulimit -n " + text(limit.rlim_max));
  }
  report.pass("open files", text(limit.rlim_cur) + " at most");
}

// Whether a process can write into another one beside it, as ranks do: a parent may always reach its children.
std::string writeToSibling() {
  static volatile std::uint64_t word;
  word = 0;
  int ready[2], done[2];
  if (pipe(ready) != 0 || pipe(done) != 0) return "no pipe";
  const pid_t sibling = fork();
  if (sibling == 0) {
    char byte = 0;
    close(done[1]);
    if (write(ready[1], &byte, 1) != 1) _exit(2);
    if (read(done[0], &byte, 1) < 0) _exit(2);
    _exit(word == 77 ? 0 : 1);
  }
  const std::string failed = apart(5, [&]() -> std::string {
    char byte = 0;
    close(done[1]);
    if (read(ready[0], &byte, 1) != 1) return "no sibling";
    std::uint64_t value = 77;
    const iovec here{&value, sizeof value}, there{const_cast<std::uint64_t*>(&word), sizeof value};
    return process_vm_writev(sibling, &here, 1, &there, 1, 0) == sizeof value ? "" : std::strerror(errno);
  });
  for (const int end : {ready[0], ready[1], done[0], done[1]}) close(end);
  int status = 0;
  waitpid(sibling, &status, 0);
  if (!failed.empty()) return failed;
  return status == 0 ? "" : "nothing arrived";
}

void checkProcessVm(Report& report) {
  if (setting("FUSCO_PROCESS_VM") == "0") return report.pass("process_vm", "switched off (FUSCO_PROCESS_VM=0)");
  const std::string failed = writeToSibling();
  if (failed.empty()) return report.pass("process_vm", "ranks can write into each other's private memory");
  const std::string scope = report.line("/proc/sys/kernel/yama/ptrace_scope");
  const std::string found = "ranks cannot write into each other's private memory (" + failed +
                            (scope.empty() ? "" : ", kernel.yama.ptrace_scope is " + scope) +
                            "): it is copied through windows";
  report.warn("process_vm", found,
              scope == "1" || scope == "2"
                  ? "sysctl -w kernel.yama.ptrace_scope=0; or tensors from fuscoMemAlloc"
                  : "start the container with --cap-add=SYS_PTRACE; or tensors from fuscoMemAlloc");
}

void checkIdentity(Report& report) {
  const std::string boot = report.line("/proc/sys/kernel/random/boot_id");
  if (boot.empty()) {
    return report.fail("host identity", "/proc/sys/kernel/random/boot_id cannot be read",
                       "mount /proc, or set FUSCO_HOSTID to a name of this host on each");
  }
  const std::string named = setting("FUSCO_HOSTID");
  report.pass("host identity", "boot id " + boot.substr(0, 8) + (named.empty() ? "" : ", FUSCO_HOSTID=" + named));
}

}  // namespace

// What the library itself says of the environment, when it is first used.
void checkSettings(Report& report) {
  const std::string said = apart(5, []() -> std::string {
    int ends[2];
    if (pipe(ends) != 0) return "no pipe";
    setenv("FUSCO_DEBUG", "WARN", 1);
    setenv("FUSCO_DEBUG_FILE", "", 1);
    dup2(ends[1], STDERR_FILENO);
    const char* value = "";
    fuscoGetSetting("FUSCO_DEVICE", &value);
    close(ends[1]);
    close(STDERR_FILENO);
    std::string text;
    char buffer[1024];
    for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;)
      text.append(buffer, static_cast<std::size_t>(got));
    return text;
  });
  if (said.empty()) return report.pass("settings", "all are understood");
  const std::size_t begin = said.find("WARN ");
  const std::string line = said.substr(0, said.find('\n'));
  report.warn("settings", begin == std::string::npos ? line : line.substr(begin + 5), "docs/environment.md lists them");
}

void checkMachine(Report& report) {
  checkCores(report);
  checkMemory(report);
  checkHugePages(report);
  checkFiles(report);
  checkProcessVm(report);
  checkIdentity(report);
}

}  // namespace fusco::bench::doctor
