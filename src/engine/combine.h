// Combine: the experts' rows back to their tokens, weighted and summed (arXiv 2512.22036, section 3.3, reversed). Home
// reads its own node's rows where they lie; a forwarder sums its node's rows for every token that came through it and
// sends one partial row back along the stream that brought the token.
#pragma once

#include <vector>

#include "engine/shuffle_operation.h"
#include "engine/stream_io.h"

namespace fusco::engine {

// Rows of the node's ranks as terms of sums: by address, or fetched into scratch by process_vm_readv.
class TermSource {
 public:
  explicit TermSource(Engine& engine) : engine_(engine) {}
  void bind(const Meeting& meeting, const std::byte* own, std::size_t rowBytes, exec::RowType type, bool weighted);
  // Appends the terms of one copy, in the order rank, slot. `offset` is the part's place in its row.
  void append(const plan::Copy& copy, std::uint32_t endEntry, const plan::Entry* entries, const float* weights,
              std::size_t offset, std::vector<exec::Term>& terms);
  // Fetches what was appended and is not mapped; `partBytes` of each row. Call once before the sum.
  void fetch(std::size_t partBytes, std::vector<exec::Term>& terms);
  // How many rows may be appended before fetch (scratch is bounded).
  bool fetches() const { return anyRemote_; }

 private:
  struct Wanted {
    std::size_t term;
    int rank;
    std::uint64_t address;
  };
  Engine& engine_;
  std::vector<const std::byte*> bases_;
  std::vector<std::uint64_t> remote_;
  std::vector<Wanted> wanted_;
  std::size_t rowBytes_ = 0;
  exec::RowType type_ = exec::RowType::bf16;
  bool weighted_ = true;
  bool anyRemote_ = false;
};

class Combine : public ShuffleOperation {
 public:
  Combine(Engine& engine, std::shared_ptr<PlanState> plan, const CombineRequest& request);

 protected:
  void reset() override;
  Outcome run(const Step& step) override;
  bool needs(const Step& step, int rank) const override;

 private:
  Outcome announceReady();
  Outcome bindPeers();
  Outcome sumHome();
  Outcome sendBack(std::size_t stream);
  void flushHome();
  bool gatherToken(std::uint32_t token);

  CombineRequest request_;
  std::size_t elementBytes_ = 0;
  std::size_t rowBytes_ = 0;
  exec::RowType partialType_ = exec::RowType::bf16;
  std::size_t partElements_ = 0;  // elements of a row that fit into one slice
  TermSource source_;
  // home
  std::size_t partAt_ = 0;  // first element of the current part
  std::int64_t token_ = 0;
  std::size_t ownCopy_ = 0;
  std::vector<StreamBack> back_;
  std::vector<std::byte*> out_;
  std::vector<const std::byte*> bias_;
  std::vector<exec::Term> terms_;
  std::vector<std::uint32_t> first_;
  // forwarder, by stream in
  struct Progress {
    std::size_t copy = 0;
    std::size_t part = 0;        // first element
    bool all = false;            // has been summed
    std::size_t sliceBytes = 0;  // for slices of several rows
  };
  std::vector<Progress> sent_;
};

}  // namespace fusco::engine
