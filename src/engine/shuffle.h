// The operations of the shuffle, as values to be submitted. Pointers are the caller's and must stay until the end.
#pragma once

#include <cstddef>
#include <memory>

#include "engine/operation.h"
#include "engine/plan_state.h"
#include "exec/executor.h"

namespace fusco::engine {

class Engine;

struct DispatchRequest {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t rowBytes = 0;
  const std::byte* input2 = nullptr;
  std::byte* output2 = nullptr;
  std::size_t rowBytes2 = 0;
  bool castToFp8 = false;  // rowBytes is of the BF16 input
  std::byte* outputScales = nullptr;
};

struct CombineRequest {
  const std::byte* input = nullptr;
  std::byte* output = nullptr;
  std::size_t elements = 0;
  exec::RowType type = exec::RowType::bf16;
  const std::byte* bias = nullptr;
  bool weighted = true;
  bool partialsFp32 = false;
};

struct CombineBackwardRequest {
  const std::byte* outputGradient = nullptr;
  const std::byte* expertRows = nullptr;
  std::byte* inputGradient = nullptr;
  float* weightGradient = nullptr;
  std::size_t elements = 0;
  exec::RowType type = exec::RowType::bf16;
};

std::unique_ptr<Operation> makePlanning(Engine& engine, std::shared_ptr<PlanState> plan);
std::unique_ptr<Operation> makeDispatch(Engine& engine, std::shared_ptr<PlanState> plan,
                                        const DispatchRequest& request);
std::unique_ptr<Operation> makeCombine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request);
std::unique_ptr<Operation> makeCombineBackward(Engine& engine, std::shared_ptr<PlanState> plan,
                                               const CombineBackwardRequest& request);

}  // namespace fusco::engine
