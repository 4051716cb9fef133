// A program written against NCCL with malloc buffers, as a user would have it: it forks its ranks, and knows nothing of
// libfusco but the extra calls, which it looks up by name. Linked with libfusco, and with a double that is preloaded.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fusco/nccl.h"
#include "patience.h"

namespace fusco::test {

// Nothing is made of the text where all is well: this is asked for every byte.
template <typename Text>
void require(bool condition, const Text& text) {
  if (!condition) throw std::runtime_error(text);
}
// Throws what the library says.
void ok(ncclResult_t result, const std::string& what);
#define OK(call) ::fusco::test::ok((call), std::string(#call " at line ") + std::to_string(__LINE__))

// What the ranks of a program share.
struct Board {
  static constexpr int kIds = 64;
  ncclUniqueId ids[kIds];
  std::atomic<int> made[kIds];
  std::atomic<int> words[16];
};

struct Rank {
  int rank, ranks;
  Board* board;
  // The k-th id, made by rank 0.
  ncclUniqueId id(int k) const;
  ncclComm_t connect(int k = 0) const;
};

// Runs body in a process for each rank. The number of ranks that failed.
int runRanks(int ranks, const std::function<void(const Rank&)>& body, int seconds = kWorldSeconds);

// A byte of a message.
inline std::uint8_t byteOf(std::uint64_t seed, std::size_t i) {
  std::uint64_t x = seed + i / 8 * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9;
  return static_cast<std::uint8_t>((x ^ (x >> 32)) >> (i % 8 * 8));
}

using AllToAllv = ncclResult_t (*)(const void*, const size_t*, const size_t*, void*, const size_t*, const size_t*,
                                   ncclDataType_t, ncclComm_t, cudaStream_t);
using AllToAll = ncclResult_t (*)(const void*, void*, size_t, ncclDataType_t, ncclComm_t, cudaStream_t);
using GatherSend = ncclResult_t (*)(const void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t, const void*,
                                    int);
using ScatterRecv = ncclResult_t (*)(void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t, const void*, int);
using AlltoAll = AllToAll;
using Rooted = ncclResult_t (*)(const void*, void*, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t);

// A function that the library which the program was linked with may not have.
void* findExtra(const char* name);
template <typename Type>
Type extra(const char* name) {
  return reinterpret_cast<Type>(findExtra(name));
}

// What older headers do not name.
inline constexpr auto kFloat8e4m3 = static_cast<ncclDataType_t>(10), kFloat8e5m2 = static_cast<ncclDataType_t>(11);
inline constexpr int kShrinkAbort = 1;
using MemAlloc = ncclResult_t (*)(void**, size_t);
using MemFree = ncclResult_t (*)(void*);
using CommRegister = ncclResult_t (*)(ncclComm_t, void*, size_t, void**);
using CommDeregister = ncclResult_t (*)(ncclComm_t, void*);

// Scenarios: what they need of the command line, and they throw when something is wrong.
void randomGroups(const Rank& self, std::uint64_t seed, int groups, int threads);
void collectives(const Rank& self);
void operations(const Rank& self);
void oneThreadForAll(int ranks);
void communicators(const Rank& self);
void misuse(const Rank& self);
void abortWhileWaiting(const Rank& self);
void oneMissing(const Rank& self);
void forkedOff(const Rank& self);
void forkedOffMeanwhile();
void lastWords();
void passedOn(const Rank& self);
void carriedCommunicators(const Rank& self);
void carriedByName(const Rank& self);
void elsewhere(const Rank& self);
void everyoneMakesTheId(const Rank& self);
void shortOfThreads(int ranks);
void notCarried(const Rank& self);
void noSimulation(const Rank& self);
void lastErrors(const Rank& self);
// In front of a double, which has no collectives of its own: left out then (FUSCO_TEST_NO_COLLECTIVES).
bool hasCollectives();
// Prints what the library in front of us answers where there is no GPU.
void answers();

}  // namespace fusco::test
