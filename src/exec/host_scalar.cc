// The host executor in plain C++: for every CPU, and the definition of the results that the vector executors must meet
// bit by bit.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "exec/host.h"
#include "exec/host_numbers.h"

namespace fusco::exec {
namespace {

void copyRow(std::byte* to, const std::byte* from, std::size_t bytes) { std::memcpy(to, from, bytes); }

// Sets `codes` and the scale of one group. The scale follows the finite elements; infinities saturate.
float castGroup(const std::byte* row, std::size_t first, std::uint8_t* codes) {
  float largest = 0;
  for (std::size_t i = 0; i < kScaleGroup; ++i) {
    const float x = std::fabs(loadElement(row, first + i, RowType::bf16));
    if (std::isfinite(x)) largest = std::max(largest, x);
  }
  const float scale = std::max(largest, kFp8Floor) / kFp8Max;
  for (std::size_t i = 0; i < kScaleGroup; ++i)
    codes[i] = floatToE4m3(loadElement(row, first + i, RowType::bf16) / scale);
  return scale;
}

class ScalarExecutor final : public Executor {
 public:
  void place(const PlaceArgs& args) override {
    if (args.rowBytes == 0) return;
    for (std::size_t c = args.begin; c < args.end; ++c) {
      const std::byte* row = sourceRow(args, c);
      for (std::uint32_t e = args.copies[c].firstEntry; e < args.copies[c + 1].firstEntry; ++e) {
        if (leftOut(args, args.entries[e])) continue;
        std::byte* to = rowOf(args.bases, args.entries[e], args.destinationStride);
        if (to != nullptr) copyRow(to, row, args.rowBytes);
      }
    }
  }

  void sum(const SumArgs& args) override {
    checkSum(args);
    for (std::size_t r = 0; r < args.rows; ++r) {
      const std::byte* bias = args.bias == nullptr ? nullptr : args.bias[r];
      for (std::size_t i = 0; i < args.elements; ++i) {
        float total = bias == nullptr ? 0.0f : loadElement(bias, i, args.outType);
        for (std::uint32_t t = args.first[r]; t < args.first[r + 1]; ++t)
          total = std::fmaf(args.terms[t].weight, loadElement(args.terms[t].row, i, args.terms[t].type), total);
        storeElement(args.out[r], i, args.outType, total);
      }
    }
  }

  void back(const BackArgs& args) override {
    checkBack(args);
    const PlaceArgs& p = args.place;
    const std::size_t elements = p.rowBytes / elementBytes(args.type);
    for (std::size_t c = p.begin; c < p.end; ++c) {
      const std::byte* row = sourceRow(p, c);
      for (std::uint32_t e = p.copies[c].firstEntry; e < p.copies[c + 1].firstEntry; ++e) {
        const plan::Entry& entry = p.entries[e];
        if (leftOut(p, entry)) continue;
        const float weight = args.weights == nullptr ? 1.0f : args.weights[e];
        std::byte* to = rowOf(p.bases, entry, p.destinationStride);
        if (to != nullptr)
          for (std::size_t i = 0; i < elements; ++i)
            storeElement(to, i, args.type, weight * loadElement(row, i, args.type));
        const std::byte* expert = rowOf(args.expertBases, entry, args.expertStride);
        if (expert == nullptr || args.dots == nullptr) continue;
        float partials[kDotLanes] = {};
        for (std::size_t i = 0; i < elements; ++i)
          partials[i % kDotLanes] =
              std::fmaf(loadElement(row, i, args.type), loadElement(expert, i, args.type), partials[i % kDotLanes]);
        args.dots[e] = foldDot(partials);
      }
    }
  }

  void cast(const CastArgs& args) override {
    checkCast(args);
    const PlaceArgs& p = args.place;
    for (std::size_t c = p.begin; c < p.end; ++c) {
      const std::byte* row = sourceRow(p, c);
      for (std::size_t first = 0; first < args.elements; first += kScaleGroup) {
        std::uint8_t codes[kScaleGroup];
        const float scale = castGroup(row, first, codes);
        for (std::uint32_t e = p.copies[c].firstEntry; e < p.copies[c + 1].firstEntry; ++e) {
          if (leftOut(p, p.entries[e])) continue;
          std::byte* to = rowOf(p.bases, p.entries[e], p.destinationStride);
          if (to != nullptr) std::memcpy(to + first, codes, kScaleGroup);
          std::byte* scales = rowOf(args.scaleBases, p.entries[e], args.scaleStride);
          if (scales != nullptr) std::memcpy(scales + first / kScaleGroup * sizeof(float), &scale, sizeof(float));
        }
      }
    }
  }

  void move(const MoveArgs& args) override {
    moveRows(args, [](std::byte* to, const std::byte* from, std::size_t bytes, const std::byte*) {
      copyRow(to, from, bytes);
    });
  }
  void fill(void* address, std::size_t bytes) override {
    if (bytes != 0) std::memset(address, 0, bytes);
  }
  void fence() override { std::atomic_thread_fence(std::memory_order_seq_cst); }
  const char* name() const override { return "scalar"; }
};

}  // namespace

Executor* scalarExecutor() {
  static ScalarExecutor executor;
  return &executor;
}

}  // namespace fusco::exec
