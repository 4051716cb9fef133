// Chooses the host executor for this CPU.
#include "exec/host.h"

#include <cstring>
#include <string>

#include "base/status.h"
#include "exec/host_numbers.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fusco::exec {
namespace {

#if defined(__x86_64__)
bool hasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}

bool hasAvx2() {  // asks the operating system too: it must save the wide registers
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && hasF16c();
}

bool hasAvx512() {
  return hasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool hasAvx2() { return false; }
bool hasAvx512() { return false; }
#endif

Executor* bestExecutor() {
  if (hasAvx512()) return avx512Executor();
  if (hasAvx2()) return avx2Executor();
  return scalarExecutor();
}

}  // namespace

std::size_t elementBytes(RowType type) {
  switch (type) {
    case RowType::bytes:
      return 1;
    case RowType::f16:
    case RowType::bf16:
      return 2;
    case RowType::f32:
      return 4;
  }
  fail(Code::invalidArgument,
       "executor: row type " + std::to_string(static_cast<int>(type)) + " is unknown; use bytes, f16, f32 or bf16");
}

void requireNumber(RowType type, const char* where) {
  if (type == RowType::f16 || type == RowType::bf16 || type == RowType::f32) return;
  fail(Code::invalidArgument, std::string("executor: ") + where + ": rows of type " +
                                  std::to_string(static_cast<int>(type)) +
                                  " cannot be added or scaled; use f16, f32 or bf16");
}

void checkSum(const SumArgs& args) {
  requireNumber(args.outType, "sum");
  if (args.rows == 0) return;
  for (std::uint32_t i = args.first[0]; i < args.first[args.rows]; ++i)
    requireNumber(args.terms[i].type, "a term of sum");
}

void checkBack(const BackArgs& args) {
  requireNumber(args.type, "back");
  if (args.place.rowBytes % elementBytes(args.type) == 0) return;
  fail(Code::invalidArgument,
       "executor: back: rows of " + std::to_string(args.place.rowBytes) +
           " bytes are no whole number of elements; set place.rowBytes to elements * element size");
}

void checkCast(const CastArgs& args) {
  if (args.elements % kScaleGroup == 0) return;
  fail(Code::invalidArgument, "executor: cast: rows of " + std::to_string(args.elements) +
                                  " elements cannot be split into groups of 128 with a scale each; pad the rows");
}

Passage& Executor::passage(std::uint64_t) {
  // Has no state: one for all.
  static Passage memoryItself;
  return memoryItself;
}

Executor& hostExecutor() {
  static Executor& best = *bestExecutor();
  return best;
}

Executor* hostExecutor(const char* name) {
  if (std::strcmp(name, "scalar") == 0) return scalarExecutor();
  if (std::strcmp(name, "avx2") == 0 && hasAvx2()) return avx2Executor();
  if (std::strcmp(name, "avx512") == 0 && hasAvx512()) return avx512Executor();
  return nullptr;
}

}  // namespace fusco::exec
