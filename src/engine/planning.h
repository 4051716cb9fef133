// Planning as an operation: analyse, exchange, plan. In a node every rank publishes its counts in a window and reads
// the others'; across nodes rank j of each node scans the j-th part of the keys with its likes in ceil(log2 nodes)
// rounds, prefix and suffix at once (Hillis and Steele), so that a rank never sees ranks x experts numbers. What the
// balancer wants to know of every rank rides on the same messages, gathered instead of summed.
#pragma once

#include <vector>

#include "engine/engine.h"
#include "engine/meeting.h"
#include "engine/plan_state.h"
#include "engine/shuffle.h"
#include "engine/slice.h"

namespace fusco::engine {

// The scan across nodes of one vector, as a state machine over posted links.
class NodeScan {
 public:
  explicit NodeScan(Engine& engine) : engine_(engine) {}
  void setChannel(int channel) { channel_ = channel; }
  // `status`: 0, or a code and the rank that has it. `sums`: this node's. `peerIndex`: local index of the partners.
  // `records`: this node's part of what is gathered, of recordWords[node] words.
  void begin(std::uint64_t operation, int peerIndex, const Parameters& parameters, int statusCode, int statusRank,
             const std::vector<std::int32_t>& sums, const std::vector<std::int32_t>& records,
             const std::vector<std::size_t>& recordWords);
  // Idle, moved, or complete.
  Outcome advance();
  // Sums of all lower nodes, and of all nodes.
  std::vector<std::int32_t> before() const;
  std::vector<std::int32_t> total() const;
  // All nodes' records, by node.
  std::vector<std::int32_t> records() const;
  // A code that some rank of any node has, and that rank; and, where this rank saw that a partner has other parameters,
  // both values in words.
  int statusCode() const;
  int statusRank() const;
  const std::string& disagreement() const { return disagreement_; }
  int waitingFor() const { return waitingFor_; }  // a rank of another node, or -1

 private:
  transport::PostedLink& homeLink(int peer);
  bool send(int node, const std::vector<std::int32_t>& vector, std::size_t& sent);
  bool receive(int node, std::vector<std::int32_t>& into, std::size_t& received);
  void mergeStatus(const std::vector<std::int32_t>& from);
  void compare(int node, const std::vector<std::int32_t>& from);
  void expect();
  std::size_t recordsOf(int first, int last) const;

  // What travels: code, rank, parameters, then sums, then the records of the nodes that the sums are of.
  static constexpr std::size_t kParameters = 2;
  static constexpr std::size_t kHead = kParameters + sizeof(Parameters) / 4;

  Engine& engine_;
  int channel_ = -1;
  std::uint64_t operation_ = 0;
  Parameters parameters_;
  std::string disagreement_;
  int peerIndex_ = 0;
  int distance_ = 1;
  int waitingFor_ = -1;
  std::size_t recordsAt_ = 0;             // where records begin
  std::vector<std::size_t> recordWords_;  // by node
  std::vector<std::int32_t> mine_, prefix_, suffix_, prefixIn_, suffixIn_;
  std::size_t prefixSent_ = 0, suffixSent_ = 0, prefixReceived_ = 0, suffixReceived_ = 0;
};

class Planning : public Operation {
 public:
  Planning(Engine& engine, std::shared_ptr<PlanState> plan);
  std::string describe() const override;
  int channel() const override { return slot_; }
  void clearCounts() override { plan_->clearCounts(); }

 protected:
  void takePlace() override;
  void reset() override;
  Outcome run(const Step& step) override;

 protected:
  // Brings the caller's routing map into the plan's memory.
  virtual void copyRouting();
  // The plan is made.
  virtual void prepare();

  Engine& engine_;
  std::shared_ptr<PlanState> plan_;

 private:
  Outcome announceCounts();
  Outcome scanNodes();
  Outcome plan();
  Parameters parameters() const;
  bool balanced() const;
  std::size_t partBegin(int part) const;
  void beginScan();
  void publishSums();
  std::size_t countWords() const {
    return keys_ * (nodesInOrder_ ? 3 : 2 + static_cast<std::size_t>(engine_.nodeRanks()));
  }
  int recordBegin(int node, int part) const;
  std::size_t recordsOfPart(int part) const;
  void readRecords();
  const std::int32_t* published(const Meeting& meeting, int localIndex) const;
  void readExchanged();
  void checkCapacity();
  void failLater(Code code, const std::string& text);
  Outcome finish();
  bool acrossNodes() const { return engine_.topology().nodes() > 1; }

  int slot_ = -1;   // taken when the operation is queued
  bool exchanges_;  // false: slotted, no count round
  Meeting counts_;
  Meeting sums_;  // second round in the node, after the scan across nodes; the next sequence of the slot
  NodeScan scan_;
  int parts_ = 1;  // ranks of each node that scan
  // Nodes hold ranks in one piece, so that lower nodes are lower ranks. Else the scan carries every rank's counts.
  bool nodesInOrder_ = true;
  std::size_t keys_ = 0;
  std::size_t recordWords_ = 0;        // that each rank tells the balancer
  std::vector<std::int32_t> records_;  // of all ranks
  bool scanning_ = false;
  bool announcedSums_ = false;
  std::string failure_;        // of this rank's own routing map
  std::exception_ptr failed_;  // what all ranks will be told
};

}  // namespace fusco::engine
