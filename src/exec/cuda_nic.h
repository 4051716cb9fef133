// What the driver offers to devices beside the GPU that read and write its memory: NICs.
#pragma once

#include <cstddef>
#include <string>

namespace fusco::exec::cuda {

// Of the current GPU, as the run time numbers them: cudaDevAttrGPUDirectRDMAWritesOrdering and -FlushWritesOptions.
struct NicWrites {
  int major;  // compute capability
  int ordering;
  int flushOptions;
};
NicWrites nicWrites();
// The current GPU can read afterwards what NICs wrote into its memory before.
void flushNicWrites();
// A dmabuf of whole pages of the current GPU's memory, the caller's to close; -1, and why.
int exportDmaBuf(const void* begin, std::size_t bytes, std::string* why);

}  // namespace fusco::exec::cuda
