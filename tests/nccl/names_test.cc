// Every name of NCCL is there and leads to the real library: the double's, and those of libraries and headers found
// here.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "house/pattern.h"
#include "plugin/nccl/functions.h"
#include "plugin/nccl/meeting.h"
#include "plugin/nccl/real.h"

// Reached by its symbol alone: the list of names knows no signatures.
extern "C" ncclResult_t ncclDevCommCreate();

namespace fusco::nccl {
namespace {

std::string outputOf(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return "popen failed";
  std::string output;
  char buffer[4096];
  for (std::size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) output.append(buffer, n);
  pclose(pipe);
  return output;
}

std::set<std::string> exportsOf(const std::string& library) {
  std::set<std::string> names;
  std::istringstream words(outputOf("nm -D --defined-only --without-symbol-versions -P " + library));
  for (std::string line; std::getline(words, line);) names.insert(line.substr(0, line.find(' ')));
  return names;
}

// NCCLs of this machine, and those of FUSCO_TEST_NCCL, folders or files with : between them.
std::vector<std::string> installed(const char* file, std::vector<std::string> folders) {
  std::set<std::string> found;
  if (const char* more = std::getenv("FUSCO_TEST_NCCL")) {
    std::istringstream list(more);
    for (std::string folder; std::getline(list, folder, ':');) folders.push_back(folder);
  }
  for (const std::string& folder : folders) {
    for (const char* sub : {"", "/lib", "/include"}) {
      std::error_code none;
      const auto path = std::filesystem::canonical(folder + sub + "/" + file, none);
      if (!none) found.insert(path.string());
    }
  }
  return {found.begin(), found.end()};
}
std::vector<std::string> libraries() {
  return installed("libnccl.so.2", {"/usr/local/cuda/lib64", "/usr/local/lib", "/usr/lib/x86_64-linux-gnu",
                                    "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/cuda/lib"});
}
std::vector<std::string> headers() { return installed("nccl.h", {"/usr/local/cuda", "/usr/local", "/usr"}); }

// In a process of its own, with the real library of that name, or whichever is found: the text of what is wrong, "" if
// nothing.
std::string inChild(const std::string& library, const std::function<std::string()>& body) {
  int ends[2];
  if (pipe(ends) != 0) return "pipe";
  const pid_t child = fork();
  if (child == 0) {
    if (library.empty()) {
      unsetenv("FUSCO_NCCL_LIB");
    } else {
      setenv("FUSCO_NCCL_LIB", library.c_str(), 1);
    }
    setenv("FUSCO_DEVICE", "auto", 1);
    std::string text;
    try {
      text = body();
    } catch (const std::exception& error) {
      text = error.what();
    }
    if (write(ends[1], text.data(), text.size()) < 0) _exit(2);
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<std::size_t>(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? text : text + " (the process ended with " + std::to_string(status) + ")";
}

TEST(Names, AreExportedWithTheirTwins) {
  const std::set<std::string> exported = exportsOf(FUSCO_NCCL_LIBRARY);
  std::set<std::string> wanted = {"ncclAllToAllv", "ncclAllToAll", "gatherSend", "scatterRecv", "fuscoNcclComm"};
  for (const FunctionInfo& function : kFunctions) {
    wanted.insert(std::string("nccl") + function.name);
    wanted.insert(std::string("pnccl") + function.name);
  }
  EXPECT_EQ(exported, wanted);
}

TEST(Names, OfEveryInstalledLibraryAreKnown) {
  if (libraries().empty()) GTEST_SKIP() << "no libnccl.so.2 on this machine";
  const std::set<std::string> ours = exportsOf(FUSCO_NCCL_LIBRARY);
  for (const std::string& library : libraries()) {
    int seen = 0;
    for (const std::string& name : exportsOf(library)) {
      if (!name.starts_with("nccl") && !name.starts_with("pnccl")) continue;
      ++seen;
      EXPECT_TRUE(ours.contains(name)) << library << " has " << name << ", which functions.inc lacks";
    }
    EXPECT_GT(seen, 50) << library;
  }
}

TEST(Names, OfEveryInstalledHeaderAreKnown) {
  if (headers().empty()) GTEST_SKIP() << "no nccl.h on this machine";
  const std::set<std::string> ours = exportsOf(FUSCO_NCCL_LIBRARY);
  for (const std::string& header : headers()) {
    std::ifstream file(header);
    std::stringstream text;
    text << file.rdbuf();
    const std::string source = text.str();
    static const house::Pattern prototype("(?:ncclResult_t|char\\*|void) +(p?nccl[A-Z][A-Za-z0-9]*) *\\(");
    const std::vector<std::string> declared = prototype.firstGroups(source);
    for (const std::string& name : declared) EXPECT_TRUE(ours.contains(name)) << header << " declares " << name;
    EXPECT_GT(declared.size(), 50u) << header;
  }
}

// The forwarders of the other architecture at least assemble, with all names, each with its slot. clang has an
// assembler for both; what it makes is not run.
TEST(Names, AreThereForBothArchitectures) {
  if (std::system("clang --version > /dev/null 2>&1") != 0) GTEST_SKIP() << "no clang to assemble for another machine";
  for (const std::string machine : {"x86_64", "aarch64"}) {
    const std::string object = testing::TempDir() + "forward-" + machine + "-" + std::to_string(getpid()) + ".o";
    const std::string output =
        outputOf("clang --target=" + machine +
                 "-linux-gnu -I" FUSCO_SOURCE_FOLDER " -c " FUSCO_SOURCE_FOLDER "/plugin/nccl/forward.S -o " + object);
    EXPECT_EQ(output, "") << machine;
    const std::string symbols = outputOf("readelf --wide --symbols " + object);
    std::filesystem::remove(object);
    for (const FunctionInfo& function : kFunctions) {
      for (const std::string prefix : {"nccl", "pnccl"})
        EXPECT_THAT(symbols, testing::ContainsRegex("FUNC +GLOBAL +DEFAULT +[0-9]+ " + prefix + function.name + "\n"));
    }
    for (const char* own : {"fuscoNcclSlots", "fuscoNcclMissing", "fuscoNcclResolve", "fuscoNcclAnswerMissing"})
      EXPECT_THAT(symbols, testing::HasSubstr(own)) << machine;
  }
}

// Through libfusco as a user has it: what is passed on answers the number of the double's own function.
TEST(Names, LeadToTheDouble) {
  EXPECT_EQ(inChild(FUSCO_NCCL_DOUBLE,
                    [] {
                      void* const face = dlopen(FUSCO_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
                      if (face == nullptr) return std::string(dlerror());
                      std::string wrong;
                      for (unsigned i = 0; i < static_cast<unsigned>(Function::count); ++i) {
                        if (kFunctions[i].role == Role::face) continue;
                        for (const std::string& name : {std::string("nccl"), std::string("pnccl")}) {
                          const auto call = reinterpret_cast<int (*)(void*, void*, void*, void*, void*, void*)>(
                              dlsym(face, (name + kFunctions[i].name).c_str()));
                          for (int again = 0; again < 2; ++again) {
                            const int number = call(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
                            if (number != 1000 + static_cast<int>(i))
                              wrong += name + kFunctions[i].name + " answers " + std::to_string(number) + "\n";
                          }
                        }
                      }
                      return wrong;
                    }),
            "");
}

// An NCCL that somebody has loaded already, and nobody named, is the one that is used, wherever it came from: not a
// second one.
TEST(Order, LibraryThatIsThereIsTaken) {
  for (const int scope : {RTLD_LOCAL, RTLD_GLOBAL}) {
    EXPECT_EQ(inChild("",
                      [scope] {
                        void* const first = dlopen(FUSCO_NCCL_OLD_DOUBLE, RTLD_NOW | scope);
                        void* const face = dlopen(FUSCO_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
                        if (first == nullptr || face == nullptr) return std::string(dlerror());
                        const auto getVersion = reinterpret_cast<int (*)(int*)>(dlsym(face, "ncclGetVersion"));
                        const auto calls = reinterpret_cast<int (*)(const char*)>(dlsym(first, "doubleCalls"));
                        int version = 0;
                        getVersion(&version);
                        std::string wrong = version == 21803 ? "" : "version " + std::to_string(version);
                        if (calls("GetVersion") != 1) wrong += " the library that was there was not asked once";
                        return wrong;
                      }),
              "");
  }
}

// One that comes later, by the same name, changes nothing.
TEST(Order, LibraryThatComesLaterIsLeftAlone) {
  EXPECT_EQ(inChild(FUSCO_NCCL_OLD_DOUBLE,
                    [] {
                      void* const face = dlopen(FUSCO_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
                      if (face == nullptr) return std::string(dlerror());
                      const auto getVersion = reinterpret_cast<int (*)(int*)>(dlsym(face, "ncclGetVersion"));
                      int version = 0;
                      getVersion(&version);
                      void* const second = dlopen(FUSCO_NCCL_DOUBLE, RTLD_NOW | RTLD_GLOBAL);
                      if (second == nullptr) return std::string(dlerror());
                      const auto calls = reinterpret_cast<int (*)(const char*)>(dlsym(second, "doubleCalls"));
                      const int before = calls("GetVersion");
                      getVersion(&version);
                      if (version != 21803) return "version " + std::to_string(version);
                      return std::string(calls("GetVersion") == before ? "" : "the later one was asked");
                    }),
            "");
}

// Who closes it while a thread of its own still makes a communicator does not take the ground from under that thread.
TEST(Order, LibraryStaysWhereItIs) {
  EXPECT_EQ(
      inChild("",
              [] {
                setenv("FUSCO_DEVICE", "host", 1);
                void* const face = dlopen(FUSCO_NCCL_LIBRARY, RTLD_NOW | RTLD_LOCAL);
                if (face == nullptr) return std::string(dlerror());
                std::string wrong;
                // A thread with variables of its own in the library would keep it.
                std::thread([&] {
                  ncclUniqueId id{};
                  ncclComm_t comm = nullptr;
                  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
                  config.blocking = 0;
                  const auto getId = reinterpret_cast<decltype(&::ncclGetUniqueId)>(dlsym(face, "ncclGetUniqueId"));
                  const auto init =
                      reinterpret_cast<decltype(&::ncclCommInitRankConfig)>(dlsym(face, "ncclCommInitRankConfig"));
                  const auto abort = reinterpret_cast<decltype(&::ncclCommAbort)>(dlsym(face, "ncclCommAbort"));
                  if (getId(&id) != ncclSuccess || init(&comm, 2, id, 0, &config) != ncclInProgress ||
                      abort(comm) != ncclSuccess)
                    wrong = "no communicator was begun and given up";
                }).join();
                dlclose(face);
                usleep(100000);
                return wrong;
              }),
      "");
}

// Looking for NCCL inside a library that is there does not keep that library.
TEST(Order, OtherLibrariesMayGo) {
  EXPECT_EQ(inChild("",
                    [] {
                      void* const other = dlopen(FUSCO_NCCL_WRAPPER, RTLD_LAZY | RTLD_LOCAL);
                      if (other == nullptr) return std::string(dlerror());
                      realLibrary();
                      dlclose(other);
                      return std::string(dlopen(FUSCO_NCCL_WRAPPER, RTLD_LAZY | RTLD_NOLOAD) == nullptr ? "" : "kept");
                    }),
            "");
}

// And by address, also for those in which libfusco has a part.
std::string slotsLeadTo(const std::string& path) {
  std::string wrong;
  void* const real = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (real == nullptr) return dlerror();
  int found = 0;
  for (unsigned i = 0; i < static_cast<unsigned>(Function::count); ++i) {
    const auto function = static_cast<Function>(i);
    const std::string name = std::string("pnccl") + kFunctions[i].name;
    void* wanted = dlsym(real, name.c_str());
    if (wanted == nullptr) wanted = dlsym(real, name.c_str() + 1);
    if (realFunction(function) != wanted) wrong += name + " is not the real one\n";
    if (wanted == nullptr) continue;
    ++found;
    const bool direct = slotTarget(function) == wanted;
    if (direct == (kFunctions[i].role == Role::face)) wrong += name + ": its slot leads astray\n";
  }
  return found < 25 ? "hardly a function was found" : wrong;
}

TEST(Slots, LeadToTheDouble) {
  EXPECT_EQ(inChild(FUSCO_NCCL_DOUBLE, [] { return slotsLeadTo(FUSCO_NCCL_DOUBLE); }), "");
}

TEST(Slots, LeadToEveryInstalledLibrary) {
  if (libraries().empty()) GTEST_SKIP() << "no libnccl.so.2 on this machine";
  for (const std::string& library : libraries()) {
    EXPECT_EQ(inChild(library, [&] { return slotsLeadTo(library); }), "") << library;
  }
}

// Where the real library leaves room for a mark, and where its own address stands: no GPU is needed to ask for an id.
TEST(Ids, OfEveryInstalledLibraryTakeTheMark) {
  if (libraries().empty()) GTEST_SKIP() << "no libnccl.so.2 on this machine";
  for (const std::string& library : libraries()) {
    const std::string wrong = inChild(library, [] {
      setenv("FUSCO_CARRY", "all", 1);
      setenv("NCCL_SOCKET_IFNAME", "lo", 1);
      ncclUniqueId id{};
      if (::ncclGetUniqueId(&id) != ncclSuccess) return std::string("no id: ") + ::ncclGetLastError(nullptr);
      const Tag tag = readTag(id);
      if (!tag.valid()) return std::string("the id bears no mark");
      if (tag.port == 0) return std::string("nobody listens for ranks of other machines");
      sa_family_t family = 0;
      std::memcpy(&family, id.internal + 8, sizeof family);
      return std::string(family == AF_INET || family == AF_INET6 ? "" : "no address where it is expected");
    });
    EXPECT_EQ(wrong, "") << library;
  }
}

TEST(Missing, FunctionsAreSaidToBeMissing) {
  EXPECT_EQ(inChild(FUSCO_NCCL_OLD_DOUBLE,
                    [] {
                      if (slotTarget(Function::AllReduce) == nullptr) return std::string("an old function is gone");
                      const auto gone = reinterpret_cast<ncclResult_t (*)()>(&ncclDevCommCreate);
                      if (gone() != ncclInvalidUsage) return std::string("a function that is not there answers");
                      const std::string text = ::ncclGetLastError(nullptr);
                      return text.find("2.28") != std::string::npos ? std::string() : "the text is " + text;
                    }),
            "");
}

// Also when the process ends: what is found first goes last.
TEST(Missing, FunctionsAreSaidToBeMissingAtTheEnd) {
  EXPECT_EQ(inChild(FUSCO_NCCL_OLD_DOUBLE,
                    []() -> std::string {
                      std::atexit([] {
                        const auto gone = reinterpret_cast<ncclResult_t (*)()>(&ncclDevCommCreate);
                        const bool told = gone() == ncclInvalidUsage &&
                                          std::string(::ncclGetLastError(nullptr)).find(FUSCO_NCCL_OLD_DOUBLE) == 0;
                        _exit(told ? 0 : 3);
                      });
                      if (slotTarget(Function::AllReduce) == nullptr) _exit(4);
                      std::exit(5);
                    }),
            "");
}

TEST(Missing, LibraryIsSaidToBeMissing) {
  EXPECT_EQ(inChild("/nowhere/libnccl.so.2",
                    [] {
                      int version = 0;
                      if (::ncclGetVersion(&version) != ncclSystemError) return std::string("a version of nothing");
                      const std::string text = ::ncclGetLastError(nullptr);
                      if (text.find("FUSCO_NCCL_LIB") == std::string::npos) return "the text is " + text;
                      return std::string(::ncclGetErrorString(ncclInvalidUsage)) == "invalid usage"
                                 ? ""
                                 : std::string("no text");
                    }),
            "");
}

}  // namespace
}  // namespace fusco::nccl
