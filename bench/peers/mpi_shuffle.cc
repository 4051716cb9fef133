#include "peers/mpi_shuffle.h"

#include <fmt/format.h>
#include <mpi.h>

#include <climits>
#include <cstring>
#include <stdexcept>

#include "shuffle/stream.h"

namespace fusco::bench {
namespace {

void require(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw std::runtime_error(fmt::format("{}: {}", call, std::string(text, static_cast<std::size_t>(length))));
}

int asInt(std::uint64_t value) {
  if (value > INT_MAX) throw std::runtime_error(fmt::format("{} is more than an MPI count can say", value));
  return static_cast<int>(value);
}

// A contiguous type of so many bytes.
class ByteType {
 public:
  explicit ByteType(std::size_t bytes) {
    require(MPI_Type_contiguous(asInt(bytes), MPI_BYTE, &type_), "MPI_Type_contiguous");
    require(MPI_Type_commit(&type_), "MPI_Type_commit");
  }
  ByteType(const ByteType&) = delete;
  ByteType& operator=(const ByteType&) = delete;
  ~ByteType() { MPI_Type_free(&type_); }
  MPI_Datatype get() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

// Rows of a buffer for each peer, as types for MPI_Alltoallw.
class RowTypes {
 public:
  RowTypes() = default;
  RowTypes(const RowTypes&) = delete;
  RowTypes& operator=(const RowTypes&) = delete;
  ~RowTypes() { clear(); }

  // offsets: in bytes, peer after peer, counts[peer] of them.
  void make(const std::vector<MPI_Aint>& offsets, const std::vector<int>& counts, std::size_t rowBytes) {
    clear();
    const MPI_Aint* at = offsets.data();
    for (int count : counts) {
      MPI_Datatype type = MPI_BYTE;
      if (count > 0) {
        require(MPI_Type_create_hindexed_block(count, asInt(rowBytes), at, MPI_BYTE, &type),
                "MPI_Type_create_hindexed_block");
        require(MPI_Type_commit(&type), "MPI_Type_commit");
      }
      types_.push_back(type);
      ones_.push_back(count > 0 ? 1 : 0);
      zeros_.push_back(0);
      at += count;
    }
  }

  void clear() {
    for (std::size_t i = 0; i < types_.size(); ++i)
      if (ones_[i] != 0) MPI_Type_free(&types_[i]);
    types_.clear();
    ones_.clear();
    zeros_.clear();
  }

  static void exchange(const std::byte* from, const RowTypes& send, std::byte* to, const RowTypes& receive) {
    require(MPI_Alltoallw(from, send.ones_.data(), send.zeros_.data(), send.types_.data(), to, receive.ones_.data(),
                          receive.zeros_.data(), receive.types_.data(), MPI_COMM_WORLD),
            "MPI_Alltoallw");
  }

 private:
  std::vector<MPI_Datatype> types_;
  std::vector<int> ones_, zeros_;
};

std::vector<int> startsOf(const std::vector<int>& counts) {
  std::vector<int> starts(counts.size(), 0);
  for (std::size_t i = 1; i < counts.size(); ++i) starts[i] = starts[i - 1] + counts[i - 1];
  return starts;
}

// Rows by lists, packed: to[i] = from[rows[i]], or back.
void packRows(std::byte* to, const std::byte* from, const std::vector<std::int32_t>& rows, std::size_t rowBytes) {
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::memcpy(to + i * rowBytes, from + static_cast<std::size_t>(rows[i]) * rowBytes, rowBytes);
}
void unpackRows(std::byte* to, const std::byte* from, const std::vector<std::int32_t>& rows, std::size_t rowBytes) {
  for (std::size_t i = 0; i < rows.size(); ++i)
    std::memcpy(to + static_cast<std::size_t>(rows[i]) * rowBytes, from + i * rowBytes, rowBytes);
}

class MpiBase : public Implementation {
 public:
  explicit MpiBase(const CaseContext& context)
      : context_(context), input_(context.inputBytes()), output_(context.outputBytes()) {
    context.fillInput(input_.data());
    poison(output_.data(), output_.size());
  }
  std::span<std::byte> output() override { return output_.span(); }
  Stages stages() const override { return stages_; }

 protected:
  // Adds the time since the last call to a stage.
  void lap(std::uint64_t Stages::*stage) {
    std::int64_t now = nowNs();
    stages_.*stage += static_cast<std::uint64_t>(now - lap_);
    lap_ = now;
  }
  void startLaps() { lap_ = nowNs(); }

  const CaseContext& context_;
  Buffer input_, output_;
  Stages stages_;
  std::int64_t lap_ = 0;
};

// What a rank works out before it sends: from its own routing map and one exchange of counts.
struct MpiPlan {
  std::vector<std::int32_t> slots;         // own routed slots (token * topk + k) in the order of their experts
  std::vector<std::int32_t> tokens;        // the token of each
  std::vector<int> sendRows, receiveRows;  // for and from each rank
  std::vector<std::int32_t> places;        // final row of each arriving row, in order of arrival

  void make(const CaseContext& context) {
    const Routing& routing = context.map.routing[context.rank];
    int ranks = context.map.ranks, experts = context.map.experts, topk = context.map.topk;
    int most = (experts + ranks - 1) / ranks;
    auto n = static_cast<std::size_t>(ranks);

    std::vector<std::int32_t> next(static_cast<std::size_t>(experts) + 1, 0);
    for (std::int32_t id : routing.ids)
      if (id >= 0) ++next[id + 1];
    std::vector<std::int32_t> mine(n * most, 0), theirs(n * most, 0);
    sendRows.assign(n, 0);
    receiveRows.assign(n, 0);
    for (int rank = 0; rank < ranks; ++rank)
      for (int e = firstExpertOf(rank, ranks, experts), i = 0; e < firstExpertOf(rank + 1, ranks, experts); ++e, ++i) {
        mine[static_cast<std::size_t>(rank) * most + i] = next[e + 1];
        sendRows[rank] += next[e + 1];
      }
    require(MPI_Alltoall(mine.data(), most, MPI_INT32_T, theirs.data(), most, MPI_INT32_T, MPI_COMM_WORLD),
            "MPI_Alltoall");

    for (int e = 0; e < experts; ++e) next[e + 1] += next[e];
    slots.resize(static_cast<std::size_t>(next[experts]));
    tokens.resize(slots.size());
    std::size_t slot = 0;
    for (std::int32_t t = 0; t < routing.tokens; ++t)
      for (int k = 0; k < topk; ++k, ++slot) {
        std::int32_t id = routing.ids[slot];
        if (id < 0) continue;
        std::int32_t at = next[id]++;
        slots[at] = static_cast<std::int32_t>(slot);
        tokens[at] = t;
      }

    // Arrival is by source, then expert; the final order by expert, then source.
    std::vector<std::int32_t> start(n * most, 0);
    std::int32_t row = 0;
    for (int i = 0; i < most; ++i)
      for (std::size_t source = 0; source < n; ++source) {
        start[source * most + i] = row;
        row += theirs[source * most + i];
      }
    places.clear();
    places.reserve(static_cast<std::size_t>(row));
    for (std::size_t source = 0; source < n; ++source)
      for (int i = 0; i < most; ++i) {
        std::size_t at = source * most + i;
        receiveRows[source] += theirs[at];
        for (std::int32_t j = 0; j < theirs[at]; ++j) places.push_back(start[at] + j);
      }
  }

  std::uint64_t rowsToOthers(int rank) const { return slots.size() - static_cast<std::size_t>(sendRows[rank]); }
  std::uint64_t rowsBack(int rank) const { return places.size() - static_cast<std::size_t>(receiveRows[rank]); }
};

class ShuffleBase : public MpiBase {
 public:
  explicit ShuffleBase(const CaseContext& context) : MpiBase(context) { plan_.make(context_); }

 protected:
  bool planNow() const { return context_.which.op == Op::dispatch && !context_.options->planOnce; }

  // Sum of a token's rows, where rowOf(slot) lies at back + rowOf * rowBytes.
  void sumTokens(const std::byte* back, const std::vector<std::int32_t>& rowOf) {
    const Routing& routing = context_.map.routing[context_.rank];
    int topk = context_.map.topk;
    std::vector<const std::byte*> rows(static_cast<std::size_t>(topk));
    std::vector<float> weights(rows.size());
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      int count = 0;
      for (int k = 0; k < topk; ++k) {
        auto slot = static_cast<std::size_t>(t) * topk + k;
        if (routing.ids[slot] < 0) continue;
        rows[count] = back + static_cast<std::size_t>(rowOf[slot]) * context_.rowBytes;
        weights[count++] = routing.weights[slot];
      }
      sumRows(rows.data(), weights.data(), count, nullptr, 0,
              output_.data() + static_cast<std::size_t>(t) * context_.rowBytes,
              static_cast<std::size_t>(context_.options->hidden), context_.options->type, Stores::plain);
    }
  }

  MpiPlan plan_;
};

class ShuffleV : public ShuffleBase {
 public:
  explicit ShuffleV(const CaseContext& context)
      : ShuffleBase(context),
        row_(context.rowBytes),
        mine_(plan_.slots.size() * context.rowBytes),
        theirs_(plan_.places.size() * context.rowBytes) {
    poison(mine_.data(), mine_.size());
    poison(theirs_.data(), theirs_.size());
    packedRow_.assign(context.map.routing[context.rank].ids.size(), -1);
    for (std::size_t i = 0; i < plan_.slots.size(); ++i) packedRow_[plan_.slots[i]] = static_cast<std::int32_t>(i);
  }

  void run() override {
    startLaps();
    std::size_t rowBytes = context_.rowBytes;
    if (context_.which.op == Op::dispatch) {
      if (planNow()) plan_.make(context_);
      std::vector<int> sendStarts = startsOf(plan_.sendRows), receiveStarts = startsOf(plan_.receiveRows);
      lap(&Stages::plan);
      packRows(mine_.data(), input_.data(), plan_.tokens, rowBytes);
      lap(&Stages::extract);
      require(MPI_Alltoallv(mine_.data(), plan_.sendRows.data(), sendStarts.data(), row_.get(), theirs_.data(),
                            plan_.receiveRows.data(), receiveStarts.data(), row_.get(), MPI_COMM_WORLD),
              "MPI_Alltoallv");
      lap(&Stages::wire);
      unpackRows(output_.data(), theirs_.data(), plan_.places, rowBytes);
      lap(&Stages::place);
      stages_.wireBytes += plan_.rowsToOthers(context_.rank) * rowBytes;
      return;
    }
    std::vector<int> sendStarts = startsOf(plan_.receiveRows), receiveStarts = startsOf(plan_.sendRows);
    packRows(theirs_.data(), input_.data(), plan_.places, rowBytes);
    lap(&Stages::extract);
    require(MPI_Alltoallv(theirs_.data(), plan_.receiveRows.data(), sendStarts.data(), row_.get(), mine_.data(),
                          plan_.sendRows.data(), receiveStarts.data(), row_.get(), MPI_COMM_WORLD),
            "MPI_Alltoallv");
    lap(&Stages::wire);
    sumTokens(mine_.data(), packedRow_);
    lap(&Stages::sum);
    stages_.wireBytes += plan_.rowsBack(context_.rank) * rowBytes;
  }

 private:
  ByteType row_;
  Buffer mine_, theirs_;  // packed rows: of own tokens, for own experts
  std::vector<std::int32_t> packedRow_;
};

class ShuffleW : public ShuffleBase {
 public:
  explicit ShuffleW(const CaseContext& context) : ShuffleBase(context) {
    if (context.which.op == Op::combine) {
      std::size_t slots = context.map.routing[context.rank].ids.size();
      back_ = Buffer(slots * context.rowBytes);
      poison(back_.data(), back_.size());
      for (std::size_t i = 0; i < slots; ++i) slotRow_.push_back(static_cast<std::int32_t>(i));
    }
    makeTypes();
  }

  void run() override {
    startLaps();
    if (context_.which.op == Op::dispatch) {
      if (planNow()) {
        plan_.make(context_);
        makeTypes();
      }
      lap(&Stages::plan);
      RowTypes::exchange(input_.data(), mine_, output_.data(), theirs_);
      lap(&Stages::wire);
      stages_.wireBytes += plan_.rowsToOthers(context_.rank) * context_.rowBytes;
      return;
    }
    RowTypes::exchange(input_.data(), theirs_, back_.data(), mine_);
    lap(&Stages::wire);
    sumTokens(back_.data(), slotRow_);
    lap(&Stages::sum);
    stages_.wireBytes += plan_.rowsBack(context_.rank) * context_.rowBytes;
  }

 private:
  void makeTypes() {
    auto rowBytes = static_cast<MPI_Aint>(context_.rowBytes);
    const std::vector<std::int32_t>& rows = context_.which.op == Op::dispatch ? plan_.tokens : plan_.slots;
    std::vector<MPI_Aint> offsets;
    offsets.reserve(std::max(rows.size(), plan_.places.size()));
    for (std::int32_t row : rows) offsets.push_back(row * rowBytes);
    mine_.make(offsets, plan_.sendRows, context_.rowBytes);
    offsets.clear();
    for (std::int32_t row : plan_.places) offsets.push_back(row * rowBytes);
    theirs_.make(offsets, plan_.receiveRows, context_.rowBytes);
  }

  RowTypes mine_, theirs_;  // rows of own tokens; rows for own experts
  Buffer back_;             // combine: [tokens, topk] rows
  std::vector<std::int32_t> slotRow_;
};

// alltoallv and gathersend: blocks or rows by lists that are given.
class Moves : public MpiBase {
 public:
  Moves(const CaseContext& context, bool byTypes)
      : MpiBase(context),
        byTypes_(byTypes),
        unit_(context.which.op == Op::alltoallv ? bytesOf(context.options->type) : context.moves.rowBytes),
        unitType_(unit_) {
    std::size_t ranks = context.moves.moves.size();
    sendCounts_.assign(ranks, 0);
    receiveCounts_.assign(ranks, 0);
    for (std::size_t source = 0; source < ranks; ++source)
      for (const Move& move : context.moves.moves[source]) {
        if (static_cast<int>(source) == context.rank) {
          sendCounts_[move.destination] += asInt(move.bytes / unit_);
          sends_.push_back(static_cast<std::int32_t>(move.from / unit_));
          if (move.destination != context.rank) toOthers_ += move.bytes;
        }
        if (move.destination == context.rank) {
          receiveCounts_[source] += asInt(move.bytes / unit_);
          receives_.push_back(static_cast<std::int32_t>(move.to / unit_));
        }
      }
    if (context.which.op == Op::alltoallv) return;
    makeTypes();
    if (byTypes_) return;
    packed_ = Buffer(input_.size());
    arrived_ = Buffer(output_.size());
    poison(packed_.data(), packed_.size());
    poison(arrived_.data(), arrived_.size());
  }

  void run() override {
    startLaps();
    stages_.wireBytes += toOthers_;
    bool rows = context_.which.op == Op::gathersend;
    if (byTypes_) {
      if (!context_.options->planOnce) makeTypes();
      lap(&Stages::plan);
      RowTypes::exchange(input_.data(), sendTypes_, output_.data(), receiveTypes_);
      lap(&Stages::wire);
      return;
    }
    if (rows) packRows(packed_.data(), input_.data(), sends_, unit_);
    lap(&Stages::extract);
    // Blocks lie side by side in the order of ranks, packed or not.
    std::vector<int> sendStarts = startsOf(sendCounts_), receiveStarts = startsOf(receiveCounts_);
    require(MPI_Alltoallv(rows ? packed_.data() : input_.data(), sendCounts_.data(), sendStarts.data(), unitType_.get(),
                          rows ? arrived_.data() : output_.data(), receiveCounts_.data(), receiveStarts.data(),
                          unitType_.get(), MPI_COMM_WORLD),
            "MPI_Alltoallv");
    lap(&Stages::wire);
    if (rows) unpackRows(output_.data(), arrived_.data(), receives_, unit_);
    lap(&Stages::place);
  }

 private:
  void makeTypes() {
    auto offsetsOf = [&](const std::vector<std::int32_t>& rows) {
      std::vector<MPI_Aint> offsets;
      offsets.reserve(rows.size());
      for (std::int32_t row : rows) offsets.push_back(static_cast<MPI_Aint>(row) * static_cast<MPI_Aint>(unit_));
      return offsets;
    };
    if (!byTypes_) return;
    sendTypes_.make(offsetsOf(sends_), sendCounts_, unit_);
    receiveTypes_.make(offsetsOf(receives_), receiveCounts_, unit_);
  }

  bool byTypes_;
  std::size_t unit_;
  ByteType unitType_;
  std::vector<int> sendCounts_, receiveCounts_;
  std::vector<std::int32_t> sends_, receives_;  // in units
  std::uint64_t toOthers_ = 0;
  RowTypes sendTypes_, receiveTypes_;
  Buffer packed_, arrived_;
};

class SendRecv : public MpiBase {
 public:
  explicit SendRecv(const CaseContext& context) : MpiBase(context), element_(bytesOf(context.options->type)) {}

  void run() override {
    startLaps();
    int ranks = context_.options->ranks, rank = context_.rank;
    std::size_t width = bytesOf(context_.options->type);
    require(MPI_Sendrecv(input_.data(), asInt(input_.size() / width), element_.get(), (rank + 1) % ranks, 0,
                         output_.data(), asInt(output_.size() / width), element_.get(), (rank + ranks - 1) % ranks, 0,
                         MPI_COMM_WORLD, MPI_STATUS_IGNORE),
            "MPI_Sendrecv");
    lap(&Stages::wire);
    if (ranks > 1) stages_.wireBytes += input_.size();
  }

 private:
  ByteType element_;
};

}  // namespace

std::unique_ptr<Implementation> makeMpi(const std::string& name, const CaseContext& context) {
  bool types = name == "mpi-alltoallw";
  switch (context.which.op) {
    case Op::dispatch:
    case Op::combine:
      if (types) return std::make_unique<ShuffleW>(context);
      return std::make_unique<ShuffleV>(context);
    case Op::alltoallv:
    case Op::gathersend:
      return std::make_unique<Moves>(context, types);
    case Op::sendrecv:
      return std::make_unique<SendRecv>(context);
  }
  throw std::runtime_error(name + " carries out no such operation");
}

}  // namespace fusco::bench
