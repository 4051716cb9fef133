#include "transport/local/window.h"

#include <pthread.h>

#include <map>
#include <mutex>

#include "base/status.h"

namespace fusco::transport {

namespace {

struct Registry {
  std::mutex mutex;
  std::map<const std::byte*, std::shared_ptr<Window>> windows;  // by start
  std::uint32_t nextId = 1;
};

// Never destroyed: windows may be freed by destructors of other static objects.
Registry& registry() {
  static Registry* const instance = [] {
    static Registry* made = new Registry;
    // A thread may hold the lock while another one forks.
    pthread_atfork([] { made->mutex.lock(); }, [] { made->mutex.unlock(); }, [] { made->mutex.unlock(); });
    return made;
  }();
  return *instance;
}

}  // namespace

void* allocateWindow(std::size_t bytes) {
  Registry& all = registry();
  auto window = std::make_shared<Window>();
  window->memory = SharedMemory::create("fusco-window", bytes);
  std::byte* start = window->memory.data();
  std::lock_guard lock(all.mutex);
  if (all.nextId == 0) fail(Code::internalError, "this process has made 2^32 windows; no id is left");
  window->id = all.nextId++;
  all.windows.emplace(start, std::move(window));
  return start;
}

std::shared_ptr<Window> removeWindow(void* pointer) {
  Registry& all = registry();
  std::lock_guard lock(all.mutex);
  auto found = all.windows.find(static_cast<std::byte*>(pointer));
  if (found == all.windows.end()) return nullptr;
  std::shared_ptr<Window> window = std::move(found->second);
  all.windows.erase(found);
  return window;
}

std::shared_ptr<Window> findWindow(const void* address, std::size_t bytes) {
  Registry& all = registry();
  const auto* at = static_cast<const std::byte*>(address);
  std::lock_guard lock(all.mutex);
  auto behind = all.windows.upper_bound(at);
  if (behind == all.windows.begin()) return nullptr;
  const std::shared_ptr<Window>& window = std::prev(behind)->second;
  const auto offset = static_cast<std::size_t>(at - window->memory.data());
  if (offset >= window->memory.bytes() || bytes > window->memory.bytes() - offset) return nullptr;
  return window;
}

}  // namespace fusco::transport
