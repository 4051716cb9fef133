// A plan as a communicator holds it: the arena, what was given and exchanged, and the library memory that belongs to
// it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/control.h"
#include "engine/routes.h"
#include "engine/workspace.h"
#include "plan/plan.h"

namespace fusco::engine {

class DevicePlan;
class Engine;

// Beside each received row (the same bytes as fuscoTicket_t).
struct Ticket {
  std::int32_t source;
  std::int32_t token;
  std::int32_t slot;
  float weight;
  std::uint32_t primary;
};
static_assert(sizeof(Ticket) == 20);

// What came in by one stream in the first dispatch, in order: the way back follows it.
struct InflowRecord {
  std::vector<plan::Copy> copies;  // always closed: copies.back() is the sentinel
  std::vector<plan::Entry> entries;
  std::vector<float> weights;
};

struct PlanRequest {
  plan::RoutingMap map;
  plan::Options options;
  bool dropBeyondCapacity = false;
  bool dedupAuto = true;
  bool zeroFill = false;
  bool counters = false;
  bool tickets = false;
  const std::int64_t* tokensOnDevice = nullptr;  // GPUs: how many of map.tokens there are, read when it is made
  int slot = -1;  // operation slot of everything that this plan does; -1: operations take turns
};

struct PlanState {
  explicit PlanState(Engine& engine, const PlanRequest& request);

  Engine& engine;
  PlanRequest request;  // map points to the caller's memory, read when the plan is made
  std::uint64_t number = 0;
  std::shared_ptr<const Routes> routes;  // taken when planning begins, then kept
  const plan::Topology& topology() const { return routes->topology; }
  const Streams& streams() const { return routes->streams; }
  std::size_t rowCapacity = 0;  // most rows that this rank can receive; 0: known only when the plan is made
  Buffer ids;                   // the caller's routing map, kept for replay and counters
  Buffer weights;
  Buffer arena;
  plan::View view{};                   // planned by a GPU: of the arena's head, no copies, entries or weights
  std::shared_ptr<DevicePlan> device;  // null on the host
  plan::Analysis analysis;
  plan::Exchanged exchanged;
  std::vector<std::int32_t> localExpertRows;  // filled from counters in the slotted layout

  std::atomic<bool> dispatched{false};  // tickets, records and landing lists are there
  int dispatchesUnderWay = 0;           // that have announced themselves
  std::vector<InflowRecord> inflows;    // by stream in

  WindowBuffer tickets;         // Ticket [receiveRows]
  WindowBuffer landing;         // uint32 [receiveRows]: row in the landing buffer to copy from, or kNoRow
  WindowBuffer counters;        // CounterBoard
  WindowBuffer extra;           // rank order: received rows of {id, weight} [topk]
  Buffer extraRows;             // rank order: the same for this rank's tokens, as they travel
  Buffer rankOrderIds;          // int32 [receiveRows, topk], made local
  Buffer rankOrderWeights;      // float [receiveRows, topk]
  Buffer castRows, castScales;  // the input in FP8, where it cannot be cast on its way

  // From the landing list, after the first dispatch that wrote one: which rows to copy where.
  bool landingSorted = false;
  std::uint32_t landingFlags = 0;  // the ready flags it was written for
  std::vector<plan::Copy> landingCopies;
  std::vector<plan::Entry> landingEntries;

  // Also on GPUs, where ranks are on several nodes: then everything but the rows is the host's, and what users read in
  // GPU memory is brought there.
  bool madeOnHost() const { return arena.data() != nullptr; }
  plan::RoutingMap kept() const;  // the routing map as it was copied
  void packRankOrder();
  std::int64_t receiveRows() const { return view.header->receiveRows; }
  // Rows that library memory is made for: known beforehand where the plan has a capacity or fixed places, so that
  // nothing is allocated when the plan is made again and again; else what this plan receives.
  std::size_t rowsToHold() const { return rowCapacity > 0 ? rowCapacity : static_cast<std::size_t>(receiveRows()); }
  // After a failure: whoever reads the counts finds no rows.
  void clearCounts();
  void prepareWindows();  // after planning: tickets, counters, extra, as the request asks

 private:
  void setRowCapacity();
  void holdRows(std::size_t rows);
};

// In a window of the receiver: where each local expert's rows start, and how many are complete.
struct CounterBoard {
  std::uint64_t localExperts;
  // uint64 counters [localExperts], then int32 start [localExperts + 1]
  std::uint64_t* counters() { return reinterpret_cast<std::uint64_t*>(this + 1); }
  std::int32_t* starts() { return reinterpret_cast<std::int32_t*>(counters() + localExperts); }
  static std::size_t bytes(int localExperts) {
    return sizeof(CounterBoard) + static_cast<std::size_t>(localExperts) * 8 +
           (static_cast<std::size_t>(localExperts) + 1) * 4;
  }
};

}  // namespace fusco::engine
