#include "plan/print.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "plan/plan.h"

namespace fusco::plan {
namespace {

// vformat is compiled elsewhere; to format right into the text would compile all of fmt here.
template <class... Values>
void append(std::string& text, fmt::string_view format, const Values&... values) {
  text += fmt::vformat(format, fmt::make_format_args(values...));
}

// All its digits, and a decimal point; JSON has no other word than null for what is no number.
std::string jsonNumber(double value) { return std::isfinite(value) ? fmt::format("{:#}", value) : "null"; }

}  // namespace

const char* layoutName(std::uint32_t layout) {
  switch (static_cast<Layout>(layout)) {
    case Layout::expertOrder:
      return "expert order";
    case Layout::rankOrder:
      return "rank order";
    case Layout::slotted:
      return "slotted";
  }
  return "unknown";
}

const char* dedupName(std::uint32_t dedup) {
  switch (static_cast<Dedup>(dedup)) {
    case Dedup::none:
      return "none";
    case Dedup::node:
      return "node";
    case Dedup::full:
      return "full";
  }
  return "unknown";
}

std::string printText(const void* arena, std::int64_t mostCopies) {
  const View plan = view(arena);
  const ArenaHeader& h = *plan.header;
  std::string text;
  const auto line = [&](fmt::string_view format, const auto&... values) {
    append(text, format, values...);
    text += '\n';
  };
  line("plan of rank {} of {} (node {} of {}): {} tokens, top-{} of {} experts, {}, dedup {}", h.rank, h.ranks, h.node,
       h.nodes, h.tokensUsed, h.topk, h.experts, layoutName(static_cast<std::uint32_t>(h.layout)),
       dedupName(static_cast<std::uint32_t>(h.dedup)));
  line("  sends {} copies with {} entries, {} dropped; receives {} rows for {} experts; {} bytes", h.copies, h.entries,
       h.dropped, h.receiveRows, h.localExperts, h.bytes);
  for (int i = 0; i < h.localExperts && h.layout != Layout::rankOrder; ++i) {
    const int start = plan.localExpertStart[i], rows = plan.localExpertRows[i];
    line("  local expert {}: rows {} to {}", i, start, start + rows);
  }
  for (int f = 0; f < h.flows; ++f) {
    const Flow flow = plan.flows[f];
    line("  flow {}: node {} by forwarder {}, lane {}: copies {} to {}", f, flow.node, flow.forwarder, flow.lane,
         flow.copyBegin, flow.copyEnd);
    const std::int64_t shown = std::min<std::int64_t>(flow.copyEnd, flow.copyBegin + mostCopies);
    for (std::int64_t c = flow.copyBegin; c < shown; ++c) {
      std::string places;
      for (std::uint32_t e = plan.copies[c].firstEntry; e < plan.copies[c + 1].firstEntry; ++e) {
        const Entry entry = plan.entries[e];
        places += fmt::format(" [rank {} slot {} row {} weight {}{}]", entry.rank, entry.slot & kSlotMask, entry.row,
                              plan.weights[e], (entry.slot & kDuplicate) != 0 ? " duplicate" : "");
      }
      line("    token {} ->{}", plan.copies[c].token, places);
    }
    if (shown < flow.copyEnd) line("    ... {} more", flow.copyEnd - shown);
  }
  return text;
}

std::string printJson(const void* arena) {
  const View plan = view(arena);
  const ArenaHeader& h = *plan.header;
  std::string text;
  const auto number = [&](const char* name, std::int64_t value) { append(text, "\"{}\":{},", name, value); };
  const auto numbers = [&](const char* name, const std::int32_t* values, std::int32_t count) {
    append(text, "\"{}\":[", name);
    for (std::int32_t i = 0; i < count; ++i) append(text, "{}{}", i == 0 ? "" : ",", values[i]);
    text += "],";
  };
  text += '{';
  number("version", h.version);
  number("bytes", h.bytes);
  number("rank", h.rank);
  number("ranks", h.ranks);
  number("node", h.node);
  number("nodes", h.nodes);
  number("tokens", h.tokensUsed);
  number("capacity_tokens", h.tokens);
  number("topk", h.topk);
  number("experts", h.experts);
  number("local_experts", h.localExperts);
  append(text, "\"layout\":\"{}\",", layoutName(static_cast<std::uint32_t>(h.layout)));
  append(text, "\"dedup\":\"{}\",", dedupName(static_cast<std::uint32_t>(h.dedup)));
  number("alignment", h.alignment);
  number("max_tokens", h.maxTokens);
  number("capacity_rows", h.capacityRows);
  number("copies", h.copies);
  number("entries", h.entries);
  number("dropped", h.dropped);
  number("receive_rows", h.receiveRows);
  const int keys = h.layout == Layout::rankOrder ? h.ranks : h.experts;
  numbers("rows_of_key", plan.rowsOfExpert, keys);
  numbers("row_base_of_key", plan.rowBase, keys);
  numbers("local_expert_rows", plan.localExpertRows, h.localExperts);
  numbers("local_expert_start", plan.localExpertStart, h.localExperts + 1);
  text += "\"flow_list\":[";
  for (int f = 0; f < h.flows; ++f) {
    const Flow flow = plan.flows[f];
    append(text, "{}{{\"node\":{},\"forwarder\":{},\"lane\":{},\"copies\":[", f == 0 ? "" : ",", flow.node,
           flow.forwarder, flow.lane);
    for (std::uint32_t c = flow.copyBegin; c < flow.copyEnd; ++c) {
      append(text, "{}{{\"token\":{},\"entries\":[", c == flow.copyBegin ? "" : ",", plan.copies[c].token);
      const std::uint32_t first = plan.copies[c].firstEntry;
      for (std::uint32_t e = first; e < plan.copies[c + 1].firstEntry; ++e) {
        const Entry entry = plan.entries[e];
        append(text, "{}[{},{},{},{},{}]", e == first ? "" : ",", entry.rank, entry.slot & kSlotMask, entry.row,
               jsonNumber(plan.weights[e]), (entry.slot & kDuplicate) != 0);
      }
      text += "]}";
    }
    text += "]}";
  }
  return text + "]}";
}

}  // namespace fusco::plan
