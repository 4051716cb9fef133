// What one GPU can do at most: kernels that know nothing of plans, for the limit that results are held against. They do
// not use the library's kernels: a check must not run on the code that it checks.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace fusco::bench {

// `rows` rows of rowBytes at `source`, each written to the `copies` rows that places[row * copies] names; 0xffffffff
// names none. Ways: 0 a warp a row, in vectors; 1 and up: the copy engine through shared memory, where replicateCan()
// allows it.
struct Replicate {
  const std::byte* source;  // null: nothing is read, the same bytes are written everywhere (bulk ways only)
  std::byte* destination;
  const std::uint32_t* places;
  int rows;
  int copies;
  std::size_t rowBytes;
  int blocks;
};
int replicateWays();
const char* replicateName(int way);
bool replicateCan(const Replicate& what, int way);  // on the current GPU
cudaError_t replicate(const Replicate& what, int way, cudaStream_t stream);

// out[row] = sum of the rows that places names, each once: BF16, FP32 sums; the traffic of a combine.
cudaError_t gatherSum(const Replicate& what, cudaStream_t stream);

}  // namespace fusco::bench
