// Sums of terms that are given one by one: partial sums that came from other nodes, and rows for those that go there. A
// thread has one element of a row; rows may lie at any address.
#include <algorithm>

#include "kernels/grid.h"
#include "kernels/launch.h"
#include "kernels/numbers.cuh"
#include "kernels/ptx.cuh"

namespace fusco::kernels {

namespace {

constexpr int kThreads = 256;

template <typename Number>
__device__ typename Number::Element readAt(const std::byte* row, std::size_t i) {
  using Element = typename Number::Element;
  const std::byte* at = row + i * sizeof(Element);
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(Element) == 0) return __ldcs(reinterpret_cast<const Element*>(at));
  Element bits = 0;
  for (unsigned b = 0; b < sizeof(Element); ++b) bits |= static_cast<Element>(static_cast<unsigned>(at[b]) << (8 * b));
  return bits;
}

__device__ float numberAt(const std::byte* row, std::size_t i, SumType type) {
  if (type == SumType::bf16) return Bf16::load(readAt<Bf16>(row, i));
  if (type == SumType::f16) return F16::load(readAt<F16>(row, i));
  return F32::load(readAt<F32>(row, i));
}

template <typename Number>
__device__ void writeAt(std::byte* row, std::size_t i, float value) {
  using Element = typename Number::Element;
  const Element bits = Number::round(value);
  std::byte* at = row + i * sizeof(Element);
  if (reinterpret_cast<std::uintptr_t>(at) % sizeof(Element) == 0) {
    __stcs(reinterpret_cast<Element*>(at), bits);
    return;
  }
  for (unsigned b = 0; b < sizeof(Element); ++b) at[b] = static_cast<std::byte>(bits >> (8 * b));
}

// A unit is kThreads elements of a row.
struct TermKernelArgs {
  TermSumArgs sum;
  unsigned pieces;
};

template <typename Number>
__global__ void __launch_bounds__(kThreads) sumTerms(const __grid_constant__ TermKernelArgs args) {
  ptx::waitForPreviousLaunch();
  const TermSumArgs& sum = args.sum;
  const std::size_t units = static_cast<std::size_t>(sum.rows) * args.pieces;
  for (std::size_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const std::size_t row = unit / args.pieces;
    const std::size_t i = unit % args.pieces * kThreads + threadIdx.x;
    if (i >= sum.elements) continue;
    const std::byte* bias = sum.bias == nullptr ? nullptr : sum.bias[row];
    float acc = bias == nullptr ? 0.0f : numberAt(bias, i, sum.type);
    const unsigned end = sum.first[row + 1];
#pragma unroll 4
    for (unsigned t = sum.first[row]; t < end; ++t) {
      const Term term = sum.terms[t];
      acc = fmaf(term.weight, numberAt(term.row, i, term.type), acc);
    }
    writeAt<Number>(sum.out[row], i, acc);
  }
}

}  // namespace

int launchTermSum(const TermSumArgs& sum, const Budget& budget, void* stream) {
  if (sum.rows == 0 || sum.elements == 0) return cudaSuccess;
  TermKernelArgs args{};
  args.sum = sum;
  args.pieces = static_cast<unsigned>((sum.elements + kThreads - 1) / kThreads);
  const std::int64_t most = (budget.blocks > 0 ? budget.blocks : deviceShape().sms) * std::int64_t{8};
  const std::int64_t units = std::int64_t{sum.rows} * args.pieces;
  const int blocks = static_cast<int>(std::clamp<std::int64_t>(units, 1, most));
  auto* on = static_cast<cudaStream_t>(stream);
  switch (sum.type) {
    case SumType::bf16:
      return launch(sumTerms<Bf16>, args, blocks, kThreads, 0, on);
    case SumType::f16:
      return launch(sumTerms<F16>, args, blocks, kThreads, 0, on);
    case SumType::f32:
      return launch(sumTerms<F32>, args, blocks, kThreads, 0, on);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fusco::kernels
