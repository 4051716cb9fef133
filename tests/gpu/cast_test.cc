// Dispatch that casts BF16 rows to FP8 on their way: the bits of the host's executor, which is held against a reference
// of its own.
#include <gtest/gtest.h>

#include <cstring>
#include <sstream>

#include "exec/executor.h"
#include "gpu/space.h"

namespace fusco::test {
namespace {

struct Shape {
  int ranks;
  std::size_t elements;
  std::size_t skew;  // of the tensors
  bool counters;
  std::vector<int> nodes = {};  // by rank; none: one node
};

void PrintTo(const Shape& shape, std::ostream* out) {
  *out << shape.ranks << "_ranks_" << shape.elements << "_elements_skew_" << shape.skew
       << (shape.counters ? "_counted" : "") << (shape.nodes.empty() ? "" : "_on_2_nodes");
}

// What arrives of a row: codes, then scales.
std::vector<std::uint8_t> castOnHost(const std::vector<std::uint8_t>& row, std::size_t elements) {
  std::vector<std::uint8_t> out(elements + elements / 128 * 4);
  const plan::Copy copies[] = {{0, 0}, {0, 1}};
  const plan::Entry entry{0, 0, 0};
  auto* codes = reinterpret_cast<std::byte*>(out.data());
  std::byte* scales = codes + elements;
  exec::CastArgs args;
  args.place.source = reinterpret_cast<const std::byte*>(row.data());
  args.place.copies = copies;
  args.place.entries = &entry;
  args.place.end = 1;
  args.place.bases = &codes;
  args.place.destinationStride = elements;
  args.elements = elements;
  args.scaleBases = &scales;
  args.scaleStride = elements / 128 * 4;
  exec::hostExecutor("scalar")->cast(args);
  exec::hostExecutor("scalar")->fence();
  return out;
}

std::string castRank(const Shape& shape, fuscoComm_t comm, int rank) {
  Case c = randomCase(77, shape.ranks);
  c.tokens.assign(static_cast<std::size_t>(shape.ranks), 0);
  c.experts = 6;
  c.topk = 3;
  c.layout = fuscoLayoutExpertOrder;
  c.alignment = 4;
  c.capacityRows = 0;
  c.ids.assign(static_cast<std::size_t>(shape.ranks), {});
  for (int r = 0; r < shape.ranks; ++r) {
    c.tokens[static_cast<std::size_t>(r)] = 50 + 13 * r;
    for (std::int64_t i = 0; i < c.tokens[static_cast<std::size_t>(r)] * c.topk; ++i)
      c.ids[static_cast<std::size_t>(r)].push_back((i * 7 + r + i / 5) % (c.experts + 1) - 1);
  }
  const auto& ids = c.ids[static_cast<std::size_t>(rank)];
  const auto tokens = static_cast<std::size_t>(c.tokens[static_cast<std::size_t>(rank)]);
  GpuSpace space;
  GpuBytes idsThere(space, ids.size() * 8);
  std::memcpy(idsThere.here.data(), ids.data(), ids.size() * 8);
  fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
  config.expertIds = idsThere.send();
  config.tokens = static_cast<std::int64_t>(tokens);
  config.topk = c.topk;
  config.experts = c.experts;
  config.alignment = c.alignment;
  config.zeroFill = 1;
  config.tickets = 1;
  config.expertCounters = shape.counters;
  fuscoPlan_t plan = nullptr;
  FUSCO_OK(fuscoPlanCreate(&plan, &config, comm, space.stream()));
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO_OK(fuscoPlanGetInfo(plan, &info));
  const auto rows = static_cast<std::size_t>(info.receiveRows);
  const std::size_t rowBytes = shape.elements * 2, scaleBytes = shape.elements / 128 * 4;
  GpuBytes input(space, tokens * rowBytes + shape.skew), output(space, rows * shape.elements + shape.skew),
      scales(space, rows * scaleBytes + shape.skew);
  for (std::size_t t = 0; t < tokens; ++t)
    fillRow(c.seed, 0, rank, static_cast<std::int64_t>(t), input.here.data() + shape.skew + t * rowBytes, rowBytes);
  std::fill(output.here.begin(), output.here.end(), std::uint8_t{0xa5});
  std::fill(scales.here.begin(), scales.here.end(), std::uint8_t{0xa5});
  fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
  args.input = static_cast<char*>(input.send()) + shape.skew;
  args.output = static_cast<char*>(output.send()) + shape.skew;
  args.rowBytes = rowBytes;
  args.cast = fuscoCastBf16ToFp8e4m3;
  args.outputScales = reinterpret_cast<float*>(static_cast<char*>(scales.send()) + shape.skew);
  FUSCO_OK(fuscoDispatchEx(plan, &args, space.stream()));
  space.settle();
  output.fetch();
  scales.fetch();
  const fuscoTicket_t* there = nullptr;
  FUSCO_OK(fuscoPlanTickets(plan, &there));
  std::vector<fuscoTicket_t> tickets(rows);
  if (rows > 0) space.read(tickets.data(), there, rows * sizeof(fuscoTicket_t));
  std::ostringstream wrong;
  std::vector<std::uint8_t> source(rowBytes);
  for (std::size_t row = 0; row < rows && wrong.str().empty(); ++row) {
    std::vector<std::uint8_t> expected(shape.elements + scaleBytes, 0);
    if (tickets[row].source >= 0) {
      fillRow(c.seed, 0, tickets[row].source, tickets[row].token, source.data(), rowBytes);
      expected = castOnHost(source, shape.elements);
    }
    if (std::memcmp(output.here.data() + shape.skew + row * shape.elements, expected.data(), shape.elements) != 0)
      wrong << "rank " << rank << " row " << row << ": codes differ";
    if (std::memcmp(scales.here.data() + shape.skew + row * scaleBytes, expected.data() + shape.elements, scaleBytes) !=
        0)
      wrong << "rank " << rank << " row " << row << ": scales differ";
  }
  if (shape.counters) {
    const volatile std::uint64_t* counters = nullptr;
    FUSCO_OK(fuscoPlanExpertCounters(plan, &counters));
    std::vector<std::uint64_t> counted(static_cast<std::size_t>(info.localExperts));
    space.read(counted.data(), const_cast<const std::uint64_t*>(counters), counted.size() * 8);
    for (int e = 0; e < info.localExperts; ++e) {
      if (counted[static_cast<std::size_t>(e)] != static_cast<std::uint64_t>(info.localExpertRows[e]))
        wrong << "counter of expert " << e << " is " << counted[static_cast<std::size_t>(e)];
    }
  }
  const Expected oracle = expectedAt(c, rank);
  std::size_t arrived = 0;
  for (const fuscoTicket_t& ticket : tickets) arrived += ticket.source >= 0;
  if (arrived != oracle.arrivals.size()) wrong << "rank " << rank << ": " << arrived << " rows have tickets";
  FUSCO_OK(fuscoPlanDestroy(plan));
  return wrong.str();
}

class GpuCast : public GpuTest, public ::testing::WithParamInterface<Shape> {};

TEST_P(GpuCast, IsTheHosts) {
  const Shape shape = GetParam();
  for (const std::string& text : runGpuRanks(
           shape.ranks, [&](fuscoComm_t comm, int rank) { return castRank(shape, comm, rank); }, 0, shape.nodes))
    EXPECT_EQ(text, "");
}

INSTANTIATE_TEST_SUITE_P(Shapes, GpuCast,
                         ::testing::Values(Shape{2, 128, 0, false}, Shape{3, 640, 0, true}, Shape{2, 7168, 0, false},
                                           Shape{2, 384, 1, false}, Shape{2, 1024, 4, true}, Shape{1, 256, 6, false},
                                           Shape{4, 640, 0, true, {0, 0, 1, 1}}, Shape{3, 7168, 0, false, {0, 1, 1}}));

}  // namespace
}  // namespace fusco::test
