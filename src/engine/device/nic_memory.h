// GPU memory as the links of a communicator get it, to be registered with NICs.
#pragma once

#include <memory>

#include "transport/gpu_memory.h"

namespace fusco::engine {

std::shared_ptr<transport::GpuMemory> nicMemory(int device);

}  // namespace fusco::engine
