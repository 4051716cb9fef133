// What libfusco has to say itself on NCCL's functions: the targets of the slots of FACE and HOST functions.
#pragma once

#include "plugin/nccl/functions.h"

namespace fusco::nccl {

// Null for functions that are only passed on.
void* faceOf(Function function);

}  // namespace fusco::nccl
