#include "plugin/nccl/faces.h"

#include <type_traits>

#include "plugin/nccl/face.h"

namespace fusco::nccl {

// A signature here that is not the header's would not be found by the linker: the symbols are reached by slots.
#define NCCL_PASS(name, major, minor)
#define NCCL_FACE(name, major, minor) static_assert(std::is_same_v<decltype(&::nccl##name), decltype(&face::name)>);
#define NCCL_HOST(name, major, minor) NCCL_FACE(name, major, minor)
#include "plugin/nccl/functions.inc"
#undef NCCL_PASS
#undef NCCL_FACE
#undef NCCL_HOST

void* faceOf(Function function) {
  switch (function) {
#define NCCL_PASS(name, major, minor)
#define NCCL_FACE(name, major, minor) \
  case Function::name:                \
    return reinterpret_cast<void*>(&face::name);
#define NCCL_HOST(name, major, minor) NCCL_FACE(name, major, minor)
#include "plugin/nccl/functions.inc"
#undef NCCL_PASS
#undef NCCL_FACE
#undef NCCL_HOST
    default:
      return nullptr;
  }
}

}  // namespace fusco::nccl
