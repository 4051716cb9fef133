// Memory calls.
#include <fmt/format.h>

#include <cstdint>

#include "api/state.h"
#include "comm/fabric.h"

using namespace fusco;
using namespace fusco::api;

namespace {
// What a registration is: a range that was checked. Private memory needs nothing more on the host.
struct Registration {
  void* pointer;
  std::size_t bytes;
};
std::mutex registrationMutex;
std::vector<std::unique_ptr<Registration>>& registrations() {
  static auto* list = new std::vector<std::unique_ptr<Registration>>;
  return *list;
}
}  // namespace

fuscoResult_t fuscoMemAlloc(void** pointer, size_t bytes) {
  return guarded("fuscoMemAlloc", [&] {
    if (pointer == nullptr) fail(Code::invalidArgument, "pointer is NULL");
    *pointer = nullptr;
    if (bytes == 0) fail(Code::invalidArgument, "bytes is 0");
    if (bytes > (std::size_t{1} << 47))
      fail(Code::invalidArgument, fmt::format("{} bytes are more than an address space holds", bytes));
    *pointer = comm::windowAllocate(bytes);
  });
}

fuscoResult_t fuscoMemFree(void* pointer) {
  return guarded("fuscoMemFree", [&] {
    if (pointer == nullptr) return;
    if (!comm::windowFree(pointer)) {
      fail(Code::invalidArgument, fmt::format("{} did not come from fuscoMemAlloc, or was freed before", pointer));
    }
  });
}

fuscoResult_t fuscoCommRegister(fuscoComm_t comm, void* pointer, size_t bytes, void** handle) {
  return guarded("fuscoCommRegister", [&] {
    findComm(comm);
    if (pointer == nullptr || handle == nullptr) fail(Code::invalidArgument, "pointer or handle is NULL");
    if (bytes == 0 || reinterpret_cast<std::uintptr_t>(pointer) + bytes < bytes) {
      fail(Code::invalidArgument, fmt::format("{} bytes at {} are no range of memory", bytes, pointer));
    }
    std::lock_guard lock(registrationMutex);
    registrations().push_back(std::make_unique<Registration>(Registration{pointer, bytes}));
    *handle = registrations().back().get();
  });
}

fuscoResult_t fuscoCommDeregister(fuscoComm_t comm, void* handle) {
  return guarded("fuscoCommDeregister", [&] {
    findCommAnyState(comm);
    std::lock_guard lock(registrationMutex);
    auto& list = registrations();
    for (auto it = list.begin(); it != list.end(); ++it) {
      if (it->get() == handle) {
        list.erase(it);
        return;
      }
    }
    fail(Code::invalidArgument, fmt::format("registration {} does not exist (any more)", handle));
  });
}
