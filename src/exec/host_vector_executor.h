// The executor made of the functions in host_vector*.h; see host_vector.h for how this is included.
#pragma once

#include "exec/host_vector.h"
#include "exec/host_vector_back.h"
#include "exec/host_vector_cast.h"
#include "exec/host_vector_sum.h"

namespace fusco::exec {
namespace {

class VectorExecutor final : public Executor {
 public:
  void place(const PlaceArgs& args) override { exec::place(args); }
  void sum(const SumArgs& args) override { exec::sum(args); }
  void back(const BackArgs& args) override { exec::back(args); }
  void cast(const CastArgs& args) override { exec::cast(args); }
  void move(const MoveArgs& args) override { exec::move(args); }
  void fill(void* address, std::size_t bytes) override { exec::fill(address, bytes); }
  void fence() override { _mm_sfence(); }
  const char* name() const override { return Simd::kName; }
};

}  // namespace
}  // namespace fusco::exec
