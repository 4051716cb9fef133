#include "plugin/nccl/real.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <string_view>
#include <vector>

#include "plugin/nccl/faces.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

extern "C" {
extern void* fuscoNcclSlots[];
extern void* const fuscoNcclMissing[];
__attribute__((visibility("hidden"))) void* fuscoNcclResolve(unsigned index) noexcept;
__attribute__((visibility("hidden"))) std::intptr_t fuscoNcclAnswerMissing(unsigned index) noexcept;
}

namespace {

constexpr unsigned kCount = static_cast<unsigned>(Function::count);

thread_local int depthInReal = 0;

struct Range {
  std::uintptr_t begin = 0, end = 0;
};

struct Library {
  void* handle = nullptr;
  std::string path;
  Range code;
};

// Opened once; a search that finds nothing is repeated by the next call, as a library may be loaded meanwhile.
std::atomic<const Library*> opened{nullptr};

const void* baseOf(const void* address) {
  Dl_info info;
  return dladdr(address, &info) != 0 ? info.dli_fbase : nullptr;
}

// The shim that bears NCCL's name needs libfusco, so that a look-up in it ends here.
bool isOurselves(void* handle) {
  void* const symbol = dlsym(handle, "ncclGetVersion");
  return symbol == nullptr || baseOf(symbol) == baseOf(reinterpret_cast<const void*>(&mode));
}

// Keeps the library for good, if it is there and an NCCL. No DEEPBIND: sanitizers refuse it, and it splits malloc.
void* open(const char* path, int extra = RTLD_NODELETE) {
  void* const handle = dlopen(path, RTLD_LAZY | RTLD_LOCAL | extra);
  if (handle == nullptr) return nullptr;
  if (!isOurselves(handle)) return handle;
  dlclose(handle);
  return nullptr;
}

int collectLoaded(dl_phdr_info* info, std::size_t, void* data) {
  if (info->dlpi_name != nullptr && info->dlpi_name[0] != 0)
    static_cast<std::vector<std::string>*>(data)->emplace_back(info->dlpi_name);
  return 0;
}

bool bearsNcclsName(const std::string& path) {
  return std::string_view(path).substr(path.rfind('/') + 1).starts_with("libnccl.so");
}

// A library that has NCCL linked into it, as torch may have. Asked for by the name that a profiler, which stands in
// front of NCCL and calls it by that, has not: its calls would come back to it for ever.
void* openIfNcclIsInside(const std::string& path) {
  void* const handle = open(path.c_str(), RTLD_NOLOAD);  // any library: not for good yet
  if (handle == nullptr) return nullptr;
  Dl_info info;
  link_map* map = nullptr;
  void* const symbol = dlsym(handle, "pncclCommInitRank");  // its own, or that of a library which it needs
  if (symbol != nullptr && dladdr(symbol, &info) != 0 && dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0 &&
      info.dli_fname != nullptr && path == map->l_name && path == info.dli_fname)
    return open(path.c_str(), RTLD_NOLOAD | RTLD_NODELETE);
  dlclose(handle);
  return nullptr;
}

// Where the loader looks, without the names that are loaded already.
std::vector<std::string> searchFolders() {
  std::vector<std::string> folders;
  Dl_info self;
  if (dladdr(reinterpret_cast<const void*>(&mode), &self) != 0) {
    if (void* const handle = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) {
      Dl_serinfo size;
      if (dlinfo(handle, RTLD_DI_SERINFOSIZE, &size) == 0) {
        std::vector<std::max_align_t> memory(size.dls_size / sizeof(std::max_align_t) + 1);
        auto* const paths = reinterpret_cast<Dl_serinfo*>(memory.data());
        if (dlinfo(handle, RTLD_DI_SERINFOSIZE, paths) == 0 && dlinfo(handle, RTLD_DI_SERINFO, paths) == 0) {
          for (unsigned i = 0; i < paths->dls_cnt; ++i) folders.emplace_back(paths->dls_serpath[i].dls_name);
        }
      }
      dlclose(handle);
    }
  }
  for (const char* usual : {"/usr/local/cuda/lib64", "/usr/local/lib"}) folders.emplace_back(usual);
  return folders;
}

void* find() {
  const std::string named = setting("FUSCO_NCCL_LIB");
  if (!named.empty()) {
    void* const handle = open(named.c_str());
    if (handle == nullptr) {
      const char* const why = dlerror();
      warnOnce("FUSCO_NCCL_LIB",
               "FUSCO_NCCL_LIB=" + named + " cannot be used: " + (why ? why : "it is libfusco itself"));
    }
    return handle;
  }
  std::vector<std::string> loaded;
  dl_iterate_phdr(&collectLoaded, &loaded);
  for (const std::string& path : loaded) {
    if (!bearsNcclsName(path)) continue;
    if (void* const handle = open(path.c_str(), RTLD_NOLOAD | RTLD_NODELETE)) return handle;
  }
  for (const std::string& path : loaded) {
    void* const handle = openIfNcclIsInside(path);
    if (handle == nullptr) continue;
    warnOnce("linked in", "NCCL is linked into " + path +
                              ": its own calls cannot be told from NCCL's, and are passed on. They can be carried only "
                              "where NCCL is a library of its own, libnccl.so.2");
    return handle;
  }
  if (void* const handle = open("libnccl.so.2")) return handle;
  for (const std::string& folder : searchFolders()) {
    if (void* const handle = open((folder + "/libnccl.so.2").c_str())) return handle;
  }
  return nullptr;
}

struct RangeSearch {
  std::uintptr_t base;
  Range found;
};
int findRange(dl_phdr_info* info, std::size_t, void* data) {
  auto& search = *static_cast<RangeSearch*>(data);
  if (info->dlpi_addr != search.base) return 0;
  search.found.begin = UINTPTR_MAX;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    search.found.begin = std::min<std::uintptr_t>(search.found.begin, search.base + header.p_vaddr);
    search.found.end = std::max<std::uintptr_t>(search.found.end, search.base + header.p_vaddr + header.p_memsz);
  }
  return 1;
}

const Library* library() {
  if (const Library* known = opened.load(std::memory_order_acquire)) return known;
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  if (const Library* known = opened.load(std::memory_order_acquire)) return known;
  void* const handle = find();
  if (handle == nullptr) return nullptr;
  // Never destroyed: static objects may call at their end.
  static auto& found = *new Library;
  found.handle = handle;
  link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) == 0) {
    found.path = map->l_name;
    RangeSearch search{map->l_addr, {}};
    dl_iterate_phdr(&findRange, &search);
    found.code = search.found;
  }
  opened.store(&found, std::memory_order_release);
  info("NCCL calls go to " + found.path);
  return &found;
}

void* lookUp(const Library& real, unsigned index) {
  const std::string name = std::string("pnccl") + kFunctions[index].name;
  void* symbol = dlsym(real.handle, name.c_str());
  return symbol != nullptr ? symbol : dlsym(real.handle, name.c_str() + 1);
}

void storeSlot(unsigned index, void* target) { __atomic_store_n(&fuscoNcclSlots[index], target, __ATOMIC_RELEASE); }

}  // namespace

Mode mode() {
  static const Mode chosen = [] {
    if (setting("FUSCO_ENABLE") == "0") return Mode::off;
    return setting("FUSCO_DEVICE") == "host" ? Mode::host : Mode::device;
  }();
  return chosen;
}

void* realFunction(Function function) {
  // 0: not looked up; 1: looked up and not there.
  static std::atomic<std::uintptr_t> known[kCount];
  const auto index = static_cast<unsigned>(function);
  std::uintptr_t address = known[index].load(std::memory_order_acquire);
  if (address == 0) {
    // Asked once: a library that another thread loads meanwhile is not one that lacks the function.
    const Library* const real = library();
    if (real == nullptr) return nullptr;
    address = reinterpret_cast<std::uintptr_t>(lookUp(*real, index));
    if (address == 0) address = 1;
    known[index].store(address, std::memory_order_release);
  }
  return address <= 1 ? nullptr : reinterpret_cast<void*>(address);
}

std::string realLibrary() {
  const Library* const real = library();
  return real == nullptr ? std::string() : real->path;
}

ncclResult_t answerMissing(Function function) {
  const FunctionInfo& wanted = infoOf(function);
  const std::string name = std::string("nccl") + wanted.name;
  std::string text;
  ncclResult_t code = ncclInvalidUsage;
  if (mode() == Mode::host) {
    text = name + " is no part of host mode (FUSCO_DEVICE=host): docs/nccl.md has what is";
  } else if (const std::string path = realLibrary(); !path.empty()) {
    text = path + " has no " + name + ", which came with NCCL " + std::to_string(wanted.major) + "." +
           std::to_string(wanted.minor);
  } else {
    code = ncclSystemError;
    text = name + " needs NCCL, and no libnccl.so.2 was found: install it or name its file by FUSCO_NCCL_LIB; " +
           "FUSCO_DEVICE=host runs on host memory without it";
  }
  setLastError(text);
  warnOnce(name, text);
  return code;
}

bool insideReal(const void* returnAddress) {
  if (depthInReal > 0) return true;
  const Library* const real = opened.load(std::memory_order_acquire);
  const auto address = reinterpret_cast<std::uintptr_t>(returnAddress);
  return real != nullptr && address >= real->code.begin && address < real->code.end;
}

InsideReal::InsideReal() { ++depthInReal; }
InsideReal::~InsideReal() { --depthInReal; }

extern "C" void* fuscoNcclResolve(unsigned index) noexcept {
  try {
    const Role role = kFunctions[index].role;
    const Mode now = mode();
    if ((now == Mode::host && role != Role::pass) || (now == Mode::device && role == Role::face)) {
      storeSlot(index, faceOf(static_cast<Function>(index)));
      return faceOf(static_cast<Function>(index));
    }
    if (now != Mode::host) {
      if (void* const real = realFunction(static_cast<Function>(index))) {
        storeSlot(index, real);
        return real;
      }
      // These return texts: the answer must be one.
      if (static_cast<Function>(index) == Function::GetErrorString ||
          static_cast<Function>(index) == Function::GetLastError)
        return faceOf(static_cast<Function>(index));
    }
  } catch (...) {
    // Out of memory: as if there were none.
  }
  return fuscoNcclMissing[index];
}

extern "C" std::intptr_t fuscoNcclAnswerMissing(unsigned index) noexcept {
  try {
    return answerMissing(static_cast<Function>(index));
  } catch (...) {
    return ncclSystemError;
  }
}

void* slotTarget(Function function) {
  fuscoNcclResolve(static_cast<unsigned>(function));
  return __atomic_load_n(&fuscoNcclSlots[static_cast<unsigned>(function)], __ATOMIC_ACQUIRE);
}

}  // namespace fusco::nccl
