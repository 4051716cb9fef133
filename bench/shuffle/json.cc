#include "shuffle/json.h"

#include <fstream>
#include <stdexcept>

#include "json_text.h"

namespace fusco::bench {

std::string jsonOf(const Options& o, const Header& h, const std::vector<Row>& rows) {
  JsonObject machine;
  machine.add("cpu", h.machine.cpu);
  machine.add("cores", h.machine.cores);
  machine.add("memory_gb", h.machine.memoryGb);
  machine.add("load", h.machine.load);
  machine.add("kernel", h.machine.kernel);
  machine.add("os", h.machine.os);
  machine.add("host", h.machine.host);
  machine.add("limit_stores", h.machine.stores);
  if (o.device == "cuda") {
    machine.add("gpu", h.machine.gpu);
    machine.add("driver", h.machine.driver);
  }
  JsonObject versions;
  versions.add("library", h.versions.library);
  versions.add("compiler", h.versions.compiler);
  versions.add("mpi", h.versions.mpi);
  if (o.device == "cuda") versions.add("nccl", h.versions.nccl);
  std::vector<JsonObject> objects;
  for (const Row& row : rows) {
    JsonObject j;
    j.add("impl", row.impl);
    j.add("op", nameOf(row.which.op));
    j.add("device", o.device);
    j.add("ranks", o.ranks);
    j.add("nodes", o.nodes);
    j.add("nodes_emulated", o.nodes > 1);
    j.add("rank_kind", o.kind == RankKind::threads ? "threads" : "processes");
    j.add("tokens", row.which.tokens);
    j.add("hidden", o.hidden);
    j.add("dtype", nameOf(o.type));
    j.add("topk", h.topk);
    j.add("experts", h.experts);
    j.add("routing", o.routing);
    j.add("routing_remark", h.routingRemark);
    j.add("seed", o.seed);
    j.add("memory", nameOf(o.memory));
    j.add("dedup", o.dedup);
    j.add("net", o.net);
    j.add("cluster_emulated", o.emulated);
    j.add("balance", o.balance);
    j.add("plan_included", row.which.op == Op::dispatch && !o.planOnce);
    j.add("bytes", row.bytes);
    j.add("count", row.count);
    j.add("wire_bytes", row.wireBytes);
    j.add("across_bytes", row.acrossBytes);
    j.add("across_busiest_node", row.acrossBusiest);
    j.add("p50_us", row.p50Us);
    j.add("p99_us", row.p99Us);
    j.add("round_p50_us", row.roundP50Us);
    j.add("rounds", o.rounds);
    j.add("iterations", o.iterations);
    j.add("algbw_gbps", row.algbw);
    j.add("busbw_gbps", row.busbw);
    j.add("limit_gbps", row.limit);
    j.add("of_limit", row.ofLimit);
    j.addText("wrong", row.checked ? jsonText(row.wrong) : "null");
    j.add("plan_us", row.planUs);
    j.add("extract_us", row.extractUs);
    j.add("wire_us", row.wireUs);
    j.add("place_us", row.placeUs);
    j.add("sum_us", row.sumUs);
    j.add("wait_us", row.waitUs);
    if (o.device == "cuda") {
      j.add("gpus", h.machine.gpus);
      j.add("sms", row.which.sms);
      j.add("graph", o.graph);
      j.add("scales", o.scales);
      j.add("write_gbps", row.writeGbps);
      j.add("read_gbps", row.readGbps);
      for (const auto& [name, value] : row.figures) j.add(name, value);
      j.add("remark", row.remark);
    } else if (row.impl == "limit") {
      j.add("read_gbps", row.readGbps);
      j.add("write_gbps", row.writeGbps);
      j.add("fill_gbps", row.fillGbps);
      j.add("stores", row.stores);
      if (row.wireAloneUs > 0) j.add("wire_alone_us", row.wireAloneUs);
    }
    j.addText("machine", machine.text());
    j.addText("versions", versions.text());
    j.add("command", h.command);
    j.add("peer_command", h.peerCommand);
    j.add("date", h.date);
    objects.push_back(std::move(j));
  }
  return jsonArray(objects);
}

void writeJson(const std::string& file, const std::string& text) {
  std::ofstream stream(file);
  stream << text;
  stream.close();
  if (!stream) throw std::runtime_error("cannot write " + file);
}

}  // namespace fusco::bench
