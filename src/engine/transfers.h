// Point to point: sends and receives of one group, matched in order per ordered pair. Each side brings its list of
// rows; within a node the sender writes straight into the receiver's rows, across nodes bytes travel in slices.
#pragma once

#include <deque>
#include <vector>

#include "engine/engine.h"
#include "engine/meeting.h"
#include "engine/slice.h"

namespace fusco::engine {

// Rows of one transfer at one end. Without a list: row i is at i.
struct TransferRequest {
  bool send = false;
  int peer = 0;
  std::byte* base = nullptr;
  std::size_t rows = 0;
  std::size_t rowBytes = 0;
  bool listed = false;
  std::vector<std::int64_t> list;
  // On GPUs the list stays where it is, and the caller's stream says when it and the rows are valid.
  const void* deviceList = nullptr;
  bool narrow = false;  // of int32, else of int64
  void* stream = nullptr;
  std::size_t bytes() const { return rows * rowBytes; }
};

// Walks two lists of rows at once and names the pieces that lie together on both sides.
class PieceWalk {
 public:
  PieceWalk(const std::int64_t* list, std::size_t rowBytes) : list_(list), rowBytes_(rowBytes) {}
  // Offset of byte `at` of the transfer in its tensor, and how many bytes follow in one piece (at most `most`).
  std::size_t piece(std::size_t at, std::size_t most, std::size_t& bytes) const;

 private:
  const std::int64_t* list_;
  std::size_t rowBytes_;
};

class Transfers : public Operation {
 public:
  Transfers(Engine& engine, std::vector<TransferRequest> requests);
  std::string describe() const override;
  // On GPUs it has those with ranks of other nodes only (device/transfers.h has the others).
  int channel() const override { return engine_.device() == nullptr ? kTransferChannel : kAcrossChannel; }

 protected:
  void reset() override;
  Outcome run(const Step& step) override;

 private:
  // A transfer under way at one end.
  struct Item {
    TransferRequest request;
    std::uint64_t sequence = 0;  // k-th of its ordered pair
    std::size_t moved = 0;
    std::byte* landing = nullptr;  // receive: where peers write, when not in place
    std::size_t listOffset = 0;    // receive: in the list window
    // Send on GPUs: a slice that is posted when its bytes have come to the host.
    bool leaving = false;
    std::size_t leavingBytes = 0;
    bool mirrored = false;  // they are in the link's GPU memory
    // Receive on GPUs: a slice whose slot is given back when its bytes have come to their rows.
    bool arriving = false;
  };
  // Everything to or from one rank, in order.
  struct Queue {
    std::deque<Item> items;
    std::size_t next = 0;  // receive in the node: next to announce
  };

  bool sameNode(int rank) const;
  Outcome advanceSend(int peer);
  Outcome advanceReceive(int peer);
  bool sendInNode(Item& item, int peer);
  // Whether anything moved, or soon will without anybody ringing.
  bool sendAcross(Item& item, int peer, bool& finished);
  void postAcross(Item& item, transport::PostedLink& link, std::size_t bytes);
  exec::Passage& passage(bool out, int peer);
  // Packs bytes of a transfer into a slice, or unpacks them, on the GPU.
  void moveOnDevice(const Item& item, std::byte* payload, std::size_t bytes);
  void settle();
  bool receiveInNode(Queue& queue, int peer);
  bool receiveAcross(Item& item, int peer, bool& finished);
  void announce(Item& item, int peer);
  void prepareWindows();
  [[noreturn]] void mismatch(int from, std::size_t sent, int to, std::size_t expected, std::uint64_t k) const;

  Engine& engine_;
  std::vector<Queue> sends_, receives_;
  std::uint64_t number_ = 0;
  int waitingFor_ = -1;
};

}  // namespace fusco::engine
