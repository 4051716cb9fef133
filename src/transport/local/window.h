// Windows: memory that this process has made shareable. One registry a process; ids are never given twice, so that a
// peer that still knows a freed window cannot take a new one for it, at whatever address it lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>

#include "transport/local/memory.h"

namespace fusco::transport {

struct Window {
  std::uint32_t id;
  SharedMemory memory;
};

// Throws systemError when memory is short.
void* allocateWindow(std::size_t bytes);

// Takes the window that starts at `pointer` out of the registry; null if there is none. Memory goes back when the last
// holder lets go of it.
std::shared_ptr<Window> removeWindow(void* pointer);

// The window in which all of [address, address + bytes) lies, or null.
std::shared_ptr<Window> findWindow(const void* address, std::size_t bytes);

}  // namespace fusco::transport
