// The functions of NCCL by number: the order of functions.inc, which is also that of the slots.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace fusco::nccl {

enum class Role : std::uint8_t { pass, face, host };

enum class Function : unsigned {
#define NCCL_PASS(name, major, minor) name,
#define NCCL_FACE(name, major, minor) name,
#define NCCL_HOST(name, major, minor) name,
#include "plugin/nccl/functions.inc"
#undef NCCL_PASS
#undef NCCL_FACE
#undef NCCL_HOST
  count
};

struct FunctionInfo {
  const char* name;  // without nccl in front
  int major, minor;  // the version that brought it
  Role role;
};

inline constexpr FunctionInfo kFunctions[] = {
#define NCCL_PASS(name, major, minor) {#name, major, minor, Role::pass},
#define NCCL_FACE(name, major, minor) {#name, major, minor, Role::face},
#define NCCL_HOST(name, major, minor) {#name, major, minor, Role::host},
#include "plugin/nccl/functions.inc"
#undef NCCL_PASS
#undef NCCL_FACE
#undef NCCL_HOST
};
static_assert(std::size(kFunctions) == static_cast<std::size_t>(Function::count));

inline const FunctionInfo& infoOf(Function function) { return kFunctions[static_cast<unsigned>(function)]; }

}  // namespace fusco::nccl
