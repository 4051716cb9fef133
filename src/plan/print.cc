#include "plan/print.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>

#include "plan/plan.h"

namespace fusco::plan {

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
    fmt::vformat_to(std::back_inserter(text), format, fmt::make_format_args(values...));
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
  using Json = nlohmann::ordered_json;
  const View plan = view(arena);
  const ArenaHeader& h = *plan.header;
  const int keys = h.layout == Layout::rankOrder ? h.ranks : h.experts;
  Json json = {{"version", h.version},
               {"bytes", h.bytes},
               {"rank", h.rank},
               {"ranks", h.ranks},
               {"node", h.node},
               {"nodes", h.nodes},
               {"tokens", h.tokensUsed},
               {"capacity_tokens", h.tokens},
               {"topk", h.topk},
               {"experts", h.experts},
               {"local_experts", h.localExperts},
               {"layout", layoutName(static_cast<std::uint32_t>(h.layout))},
               {"dedup", dedupName(static_cast<std::uint32_t>(h.dedup))},
               {"alignment", h.alignment},
               {"max_tokens", h.maxTokens},
               {"capacity_rows", h.capacityRows},
               {"copies", h.copies},
               {"entries", h.entries},
               {"dropped", h.dropped},
               {"receive_rows", h.receiveRows}};
  json["rows_of_key"] = std::vector<std::int32_t>(plan.rowsOfExpert, plan.rowsOfExpert + keys);
  json["row_base_of_key"] = std::vector<std::int32_t>(plan.rowBase, plan.rowBase + keys);
  json["local_expert_rows"] = std::vector<std::int32_t>(plan.localExpertRows, plan.localExpertRows + h.localExperts);
  json["local_expert_start"] =
      std::vector<std::int32_t>(plan.localExpertStart, plan.localExpertStart + h.localExperts + 1);
  Json flows = Json::array();
  for (int f = 0; f < h.flows; ++f) {
    const Flow flow = plan.flows[f];
    Json copies = Json::array();
    for (std::uint32_t c = flow.copyBegin; c < flow.copyEnd; ++c) {
      Json entries = Json::array();
      for (std::uint32_t e = plan.copies[c].firstEntry; e < plan.copies[c + 1].firstEntry; ++e) {
        const Entry entry = plan.entries[e];
        entries.push_back(Json::array(
            {entry.rank, entry.slot & kSlotMask, entry.row, plan.weights[e], (entry.slot & kDuplicate) != 0}));
      }
      copies.push_back({{"token", plan.copies[c].token}, {"entries", std::move(entries)}});
    }
    flows.push_back(
        {{"node", flow.node}, {"forwarder", flow.forwarder}, {"lane", flow.lane}, {"copies", std::move(copies)}});
  }
  json["flow_list"] = std::move(flows);
  return json.dump();
}

}  // namespace fusco::plan
