// What ranks of a node tell each other through control memory: ready ("here is my memory for operation k") and done ("I
// am finished with yours"). Sequences only grow; a waiter waits for >=. Rank r's control memory holds, for each channel
// and each rank p of the node, cells that only p writes and only r reads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "transport/transport.h"

namespace fusco::engine {

inline constexpr int kOperationSlots = 2;   // operation k uses channel k % 2, or the one of its plan
inline constexpr int kTransferChannel = 2;  // point to point
inline constexpr int kControlChannels = 3;
// Without cells: transfers of ranks on GPUs with other nodes, beside those in the node. Their links are the transfer
// channel's.
inline constexpr int kAcrossChannel = 3;
inline constexpr int kChannels = 4;
inline constexpr int kCellDepth = 4;  // ready cells a peer may have outstanding on a channel

// Which memory of the announcing rank a reference names.
enum MemoryRole : int {
  kRows = 0,   // dispatch: output; combine: input; transfers: receive buffer
  kRows2 = 1,  // dispatch: second output, or the scales of a cast; backward: expert rows
  kTickets = 2,
  kLanding = 3,  // expandFrom list (docs/design.md, expansion); on GPUs of one node words that tell of arrivals
  kCounters = 4,
  kExtra = 5,  // rank order: ids and weights; transfers: row list; planning: counts
  // On GPUs of one node the first four (kTickets: all that lies beside rows), then a handle of two for each; on GPUs of
  // several nodes all of the above, then a handle of two for each of kRows and kRows2.
  kMemoryRoles = 12,
};

// Flags of a ready cell.
enum ReadyFlags : std::uint32_t {
  kWantsPrimariesOnly = 1,  // leave duplicates out, the receiver expands them
  kWantsLandingList = 2,    // write expandFrom for what is left out (or, with kStaged, for every row)
  kStaged = 4,              // rows land in a library window, the receiver copies every row out
  kWantsTickets = 8,
  kWantsCounters = 16,
  // Transfers on GPUs; kStaged there: rows lie in the sender's window, kWantsLandingList: they have a list.
  kNarrowList = 32,  // of int32
  kCaptured = 64,    // valid in the graph that is being captured
  // Dispatch on GPUs.
  kCountsAtEnd = 128,  // counters of complete rows, when all rows are
  // Dispatch and combine on GPUs: rows may cross links once, as far as this rank goes; launches of it may wait beside
  // others.
  kCrossesOnce = 256,
  kWaitsBeside = 512,
  kMapReached = 1024,  // planning on GPUs: others may read this rank's routing map
  kFollows = 2048,     // dispatch on GPUs: in the capture nothing is between this rank's planning and it
};

// What all ranks must agree on; compared field by field so that an error can name both values.
struct Parameters {
  std::uint64_t kind = 0;  // OperationKind
  std::uint64_t rowBytes = 0;
  std::uint64_t rowBytes2 = 0;
  std::uint64_t type = 0;
  std::uint64_t experts = 0;
  std::uint64_t topk = 0;
  std::uint64_t layout = 0;
  std::uint64_t alignment = 0;
  std::uint64_t capacity = 0;
  std::uint64_t maxTokens = 0;
  std::uint64_t planNumber = 0;  // which plan of the communicator
  std::uint64_t options = 0;
};

struct alignas(64) ReadyCell {
  std::atomic<std::uint64_t> sequence;  // k + 1 once the rest is valid for operation k
  std::uint32_t flags;
  std::uint32_t status;  // Code: this rank takes part only to say that it failed
  std::uint64_t bytes;
  std::uint64_t rows;
  Parameters parameters;
  transport::MemoryRef memory[kMemoryRoles];
};

struct alignas(64) DoneCell {
  std::atomic<std::uint64_t> sequence;  // k + 1: finished with operation k
  std::uint64_t status;                 // transfers: Code
  std::uint64_t bytes;                  // transfers: what the source brought
};

struct PeerCells {
  ReadyCell ready[kCellDepth];
  DoneCell done[kCellDepth];
};

inline std::size_t controlBytes(int ranksOfNode) {
  return sizeof(PeerCells) * kControlChannels * static_cast<std::size_t>(ranksOfNode);
}

// The cells in `control` (some rank's control memory) that the rank with local index `writer` writes.
inline PeerCells& cells(std::byte* control, int ranksOfNode, int channel, int writer) {
  auto* all = reinterpret_cast<PeerCells*>(control);
  return all[static_cast<std::size_t>(channel) * static_cast<std::size_t>(ranksOfNode) +
             static_cast<std::size_t>(writer)];
}

}  // namespace fusco::engine
