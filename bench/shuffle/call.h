// Calls of the public header, as the benchmark makes them.
#pragma once

#include <fmt/format.h>
#include <fusco/fusco.h>

#include <stdexcept>
#include <string>

#include "shuffle/options.h"

namespace fusco::bench {

inline void require(fuscoResult_t result, fuscoComm_t comm, const char* call) {
  if (result == fuscoSuccess) return;
  std::string detail = comm != nullptr ? fuscoGetLastError(comm) : "";
  if (detail.empty()) detail = fuscoGetLastError(nullptr);
  throw std::runtime_error(fmt::format("{}: {}: {}", call, fuscoGetErrorString(result), detail));
}

inline fuscoDataType_t typeOf(Type type) {
  switch (type) {
    case Type::u8:
      return fuscoUint8;
    case Type::fp8:
      return fuscoFloat8e4m3;
    case Type::bf16:
      return fuscoBfloat16;
    case Type::f16:
      return fuscoFloat16;
    case Type::f32:
      return fuscoFloat32;
  }
  return fuscoUint8;
}

inline int dedupOf(const std::string& name) {
  return name == "none"   ? fuscoDedupNone
         : name == "node" ? fuscoDedupNode
         : name == "full" ? fuscoDedupFull
                          : fuscoDedupAuto;
}

}  // namespace fusco::bench
