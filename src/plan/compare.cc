#include "plan/compare.h"

#include <fmt/format.h>

#include <cstring>

#include "plan/plan.h"

namespace fusco::plan {

namespace {

// Index of the first item that differs, or -1.
template <typename T>
std::int64_t firstOther(const T* a, const T* b, std::int64_t count) {
  if (std::memcmp(a, b, sizeof(T) * count) == 0) return -1;
  std::int64_t i = 0;
  while (std::memcmp(a + i, b + i, sizeof(T)) == 0) ++i;
  return i;
}

std::string words(std::int32_t value) { return fmt::format("{}", value); }
std::string words(float value) { return fmt::format("{}", value); }
std::string words(const Flow& f) {
  return fmt::format("node {} by forwarder {} and lane {}, copies {} to {}", f.node, f.forwarder, f.lane, f.copyBegin,
                     f.copyEnd);
}
std::string words(const Copy& c) { return fmt::format("token {}, first entry {}", c.token, c.firstEntry); }
std::string words(const Entry& e) {
  return fmt::format("local rank {}, slot {}{}, row {}", e.rank, e.slot & kSlotMask,
                     (e.slot & kDuplicate) != 0 ? " (duplicate)" : "", e.row);
}

std::string headerDifference(const ArenaHeader& a, const ArenaHeader& b) {
  std::string difference;
  const auto field = [&](const char* name, auto one, auto other) {
    if (difference.empty() && one != other) {
      difference = fmt::format("{}: {} and {}", name, static_cast<std::int64_t>(one), static_cast<std::int64_t>(other));
    }
  };
  field("version", a.version, b.version);
  field("capacity in tokens", a.tokens, b.tokens);
  field("top-k", a.topk, b.topk);
  field("experts", a.experts, b.experts);
  field("ranks", a.ranks, b.ranks);
  field("nodes", a.nodes, b.nodes);
  field("rank", a.rank, b.rank);
  field("node", a.node, b.node);
  field("local experts", a.localExperts, b.localExperts);
  field("flows", a.flows, b.flows);
  field("layout", a.layout, b.layout);
  field("dedup", a.dedup, b.dedup);
  field("alignment", a.alignment, b.alignment);
  field("most tokens of a rank", a.maxTokens, b.maxTokens);
  field("capacity in rows", a.capacityRows, b.capacityRows);
  field("tokens", a.tokensUsed, b.tokensUsed);
  field("copies", a.copies, b.copies);
  field("entries", a.entries, b.entries);
  field("dropped", a.dropped, b.dropped);
  field("rows received", a.receiveRows, b.receiveRows);
  field("bytes", a.bytes, b.bytes);
  if (difference.empty() && std::memcmp(&a, &b, sizeof a) != 0) difference = "header: reserved bytes";
  return difference;
}

}  // namespace

std::string firstDifference(const void* a, const void* b) {
  const View one = view(a), other = view(b);
  std::string difference = headerDifference(*one.header, *other.header);
  const auto section = [&](const char* name, const auto* x, const auto* y, std::int64_t count) {
    if (!difference.empty()) return;
    const std::int64_t i = firstOther(x, y, count);
    if (i >= 0) difference = fmt::format("{} {}: {} and {}", name, i, words(x[i]), words(y[i]));
  };
  const ArenaHeader& h = *one.header;
  const std::int64_t keys = h.layout == Layout::rankOrder ? h.ranks : h.experts;
  section("rows of key", one.rowsOfExpert, other.rowsOfExpert, keys);
  section("row base of key", one.rowBase, other.rowBase, keys);
  section("rows of local expert", one.localExpertRows, other.localExpertRows, h.localExperts);
  section("start of local expert", one.localExpertStart, other.localExpertStart, h.localExperts + 1);
  section("flow", one.flows, other.flows, h.flows);
  section("copy", one.copies, other.copies, h.copies + 1);
  section("entry", one.entries, other.entries, h.entries);
  section("weight of entry", one.weights, other.weights, h.entries);
  return difference;
}

bool planEqual(const void* a, const void* b) { return firstDifference(a, b).empty(); }

}  // namespace fusco::plan
