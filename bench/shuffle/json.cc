#include "shuffle/json.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>

namespace fusco::bench {

using nlohmann::ordered_json;

std::string jsonOf(const Options& o, const Header& h, const std::vector<Row>& rows) {
  ordered_json machine = {
      {"cpu", h.machine.cpu},   {"cores", h.machine.cores},        {"memory_gb", h.machine.memoryGb},
      {"load", h.machine.load}, {"kernel", h.machine.kernel},      {"os", h.machine.os},
      {"host", h.machine.host}, {"limit_stores", h.machine.stores}};
  if (o.device == "cuda") {
    machine["gpu"] = h.machine.gpu;
    machine["driver"] = h.machine.driver;
  }
  ordered_json versions = {{"library", h.versions.library}, {"compiler", h.versions.compiler}, {"mpi", h.versions.mpi}};
  if (o.device == "cuda") versions["nccl"] = h.versions.nccl;
  ordered_json array = ordered_json::array();
  for (const Row& row : rows) {
    ordered_json j = {{"impl", row.impl},
                      {"op", nameOf(row.which.op)},
                      {"device", o.device},
                      {"ranks", o.ranks},
                      {"nodes", o.nodes},
                      {"nodes_emulated", o.nodes > 1},
                      {"rank_kind", o.kind == RankKind::threads ? "threads" : "processes"},
                      {"tokens", row.which.tokens},
                      {"hidden", o.hidden},
                      {"dtype", nameOf(o.type)},
                      {"topk", h.topk},
                      {"experts", h.experts},
                      {"routing", o.routing},
                      {"routing_remark", h.routingRemark},
                      {"seed", o.seed},
                      {"memory", nameOf(o.memory)},
                      {"dedup", o.dedup},
                      {"net", o.net},
                      {"cluster_emulated", o.emulated},
                      {"balance", o.balance},
                      {"plan_included", row.which.op == Op::dispatch && !o.planOnce},
                      {"bytes", row.bytes},
                      {"count", row.count},
                      {"wire_bytes", row.wireBytes},
                      {"across_bytes", row.acrossBytes},
                      {"across_busiest_node", row.acrossBusiest},
                      {"p50_us", row.p50Us},
                      {"p99_us", row.p99Us},
                      {"round_p50_us", row.roundP50Us},
                      {"rounds", o.rounds},
                      {"iterations", o.iterations},
                      {"algbw_gbps", row.algbw},
                      {"busbw_gbps", row.busbw},
                      {"limit_gbps", row.limit},
                      {"of_limit", row.ofLimit}};
    j["wrong"] = row.checked ? ordered_json(row.wrong) : ordered_json(nullptr);
    j["plan_us"] = row.planUs;
    j["extract_us"] = row.extractUs;
    j["wire_us"] = row.wireUs;
    j["place_us"] = row.placeUs;
    j["sum_us"] = row.sumUs;
    j["wait_us"] = row.waitUs;
    if (o.device == "cuda") {
      j["gpus"] = h.machine.gpus;
      j["sms"] = row.which.sms;
      j["graph"] = o.graph;
      j["scales"] = o.scales;
      j["write_gbps"] = row.writeGbps;
      j["read_gbps"] = row.readGbps;
      for (const auto& [name, value] : row.figures) j[name] = value;
      j["remark"] = row.remark;
    } else if (row.impl == "limit") {
      j["read_gbps"] = row.readGbps;
      j["write_gbps"] = row.writeGbps;
      j["fill_gbps"] = row.fillGbps;
      j["stores"] = row.stores;
      if (row.wireAloneUs > 0) j["wire_alone_us"] = row.wireAloneUs;
    }
    j["machine"] = machine;
    j["versions"] = versions;
    j["command"] = h.command;
    j["peer_command"] = h.peerCommand;
    j["date"] = h.date;
    array.push_back(std::move(j));
  }
  return array.dump(1) + "\n";
}

void checkWritable(const std::string& file) {
  if (!std::ofstream(file, std::ios::app)) throw std::runtime_error("cannot write " + file);
}

void writeJson(const std::string& file, const std::string& text) {
  std::ofstream stream(file);
  stream << text;
  stream.close();
  if (!stream) throw std::runtime_error("cannot write " + file);
}

}  // namespace fusco::bench
