// Plan files: any bytes are refused with a text, or are a plan that can be written again and replayed.
#include "base/status.h"
#include "fuzz/fuzz.h"
#include "plan/file.h"

using namespace fusco;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view bytes(reinterpret_cast<const char*>(data), size);
    const plan::PlanFile file = plan::decode(bytes);
    fuzz::require(plan::encode(plan::decode(plan::encode(file))) == plan::encode(file),
                  "a file that does not come back");
    // Large shapes with nothing in them are legal, and only slow.
    if (file.experts > 1024 || file.tokens * file.topk > 4096 || file.topology.ranks() > 64) return 0;
    if (file.options.layout == plan::Layout::slotted && file.options.maxTokens > 4096) return 0;
    const plan::OwnedArena arena = plan::replay(file);
    const plan::View view = plan::view(arena.get());
    std::size_t entries = 0;
    for (std::int64_t copy = 0; copy < view.header->copies; ++copy)
      entries += view.copies[copy + 1].firstEntry - view.copies[copy].firstEntry;
    fuzz::require(entries <= static_cast<std::size_t>(file.tokens) * static_cast<std::size_t>(file.topk),
                  "more rows than the routing map has");
  } catch (const Error&) {
    // Refused with a text.
  }
  return 0;
}

std::vector<std::string> fuzz::seeds() {
  std::vector<std::string> all;
  for (const plan::Layout layout : {plan::Layout::expertOrder, plan::Layout::rankOrder, plan::Layout::slotted}) {
    for (const int nodes : {1, 2}) {
      const std::vector<std::int64_t> ids = {0, 3, 1, -1, 2, 2};
      const std::vector<float> weights(ids.size(), 0.5f);
      const plan::Topology topology(nodes == 1 ? std::vector<int>{0, 0} : std::vector<int>{0, 1}, 1);
      plan::RoutingMap map{ids.data(), 8, weights.data(), 3, 2, 4};
      plan::Options options;
      options.layout = layout;
      if (layout == plan::Layout::slotted) options.maxTokens = 3;
      const plan::Analysis analysis = plan::analyse(map, topology, 0, options);
      plan::Exchanged exchanged;
      exchanged.before.assign(analysis.rowsOfKey.size(), 0);
      exchanged.total = analysis.rowsOfKey;
      all.push_back(plan::encode(plan::record(map, topology, 0, options, exchanged)));
    }
  }
  return all;
}
