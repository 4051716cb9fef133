#include <dlfcn.h>
#include <fmt/format.h>

#include "doctor/report.h"

namespace fusco::bench::doctor {

namespace {
constexpr int kNewestKnown = 23099;  // docs/nccl.md: functions up to 2.30 are known to libfusco
}

void checkNccl(Report& report) {
  const std::string named = setting("FUSCO_NCCL_LIB");
  const std::string file = named.empty() ? "libnccl.so.2" : named;
  // In a process of its own: NCCL starts what it likes when it is loaded.
  const std::string answer = apart(20, [&]() -> std::string {
    void* const library = dlopen(file.c_str(), RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) return std::string("-") + dlerror();
    const auto getVersion = reinterpret_cast<int (*)(int*)>(dlsym(library, "ncclGetVersion"));
    if (getVersion == nullptr) return "-" + file + " has no ncclGetVersion";
    if (dlsym(library, "fuscoNcclComm") != nullptr) return "=";
    int version = 0;
    Dl_info where;
    if (getVersion(&version) != 0) return "-" + file + " does not tell its version";
    return std::to_string(version) + " " +
           (dladdr(reinterpret_cast<void*>(getVersion), &where) != 0 ? where.dli_fname : "");
  });
  if (answer == "=") {
    return report.warn("NCCL", file + " is libfusco itself", "name NCCL's own file by FUSCO_NCCL_LIB");
  }
  const int version = std::atoi(answer.c_str());
  if (version <= 0) {
    const std::string why = answer.empty() || answer[0] != '-' ? answer : answer.substr(1);
    if (!named.empty()) return report.fail("NCCL", why, "set FUSCO_NCCL_LIB to the path of a libnccl.so.2");
    return report.pass("NCCL", "none found: only host mode and the fusco* calls work (" + why + ")");
  }
  const std::string path = answer.substr(answer.find(' ') + 1);
  const std::string found = fmt::format("{}.{}.{} at {}", version / 10000, version / 100 % 100, version % 100, path);
  if (version > kNewestKnown) {
    return report.warn("NCCL", found + " is newer than libfusco: what is new in it is not forwarded",
                       "preload a newer libfusco, or use NCCL up to 2.30");
  }
  report.pass("NCCL", found);
}

}  // namespace fusco::bench::doctor
