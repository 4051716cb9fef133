// Send and receive in GPU memory. The sender tells the receiver where its rows lie and which event makes them valid;
// the receiver launches one kernel that takes all rows of its group, and answers with the event after which the
// sender's memory is the sender's again. Rows that the receiver cannot reach go through the sender's window; so do
// small ones of a group that only sends, which then need not wait for the receiver.
#pragma once

#include <deque>
#include <vector>

#include "engine/device/peers.h"
#include "engine/transfers.h"

namespace fusco::engine {

class DeviceTransfers : public Operation {
 public:
  DeviceTransfers(Engine& engine, std::vector<TransferRequest> requests);
  std::string describe() const override;
  int channel() const override { return kTransferChannel; }

 protected:
  void reset() override;
  Outcome run(const Step& step) override;

 private:
  struct Item {
    TransferRequest request;
    std::size_t moved = 0;
  };
  struct Sends {
    std::deque<Item> items;        // not told yet, or in parts
    std::uint64_t unanswered = 0;  // told, from where the rows lie
  };
  // What a receiver has taken and not answered yet.
  struct Taken {
    int peer;
    std::uint64_t sequence;
    bool read;  // else there was nothing to read
  };

  void start();
  void copySelf();
  bool advanceSends(int peer);
  bool sendsEarly(const Item& item) const;
  bool sendInPlace(Item& item, int peer);
  bool sendParts(Item& item, int peer);
  void tell(int peer, const Item& item, std::size_t bytes, int slot, const PeerMemory& rows, const PeerMemory& list);
  void publish();
  bool advanceReceives(int peer);
  void take(Item& item, int peer, const ReadyCell& cell);
  void launch();
  DeviceEnd::Kind readyKind() const { return capturing_ ? DeviceEnd::capturedReady : DeviceEnd::ready; }
  DeviceEnd::Kind doneKind() const { return capturing_ ? DeviceEnd::capturedDone : DeviceEnd::done; }
  bool sameProcess(int peer) const { return domain_.sameProcess(engine_.topology().localIndex(peer)); }
  bool mayTell(int peer) const;
  [[noreturn]] void mismatch(int from, std::size_t sent, int to, std::size_t expected, std::uint64_t k) const;

  Engine& engine_;
  DeviceDomain& domain_;
  DevicePeers& peers_;
  std::vector<Sends> sends_;                 // by rank
  std::vector<std::deque<Item>> receives_;   // by rank
  std::vector<exec::cuda::Stream> streams_;  // of the caller, each once
  exec::cuda::Stream stream_ = nullptr;      // that the copies run on
  bool capturing_ = false;
  bool onlySends_ = true;
  std::vector<kernels::RowCopy> copies_;
  std::vector<Taken> taken_;
  bool partsTaken_ = false;      // of transfers that go on
  std::int64_t takenSince_ = 0;  // when the first of them was
  // Cells that are filled in, but not shown yet.
  struct Untold {
    int peer;
    ReadyCell* cell;
    std::uint64_t sequence;
  };
  std::vector<Untold> untold_;
  std::uint64_t number_ = 0;
  int waitingFor_ = -1;
};

}  // namespace fusco::engine
