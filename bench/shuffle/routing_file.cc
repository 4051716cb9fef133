// Routing that was recorded: what RoutingSource reads from files.
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

#include "shuffle/routing.h"

namespace fusco::bench {
namespace {

using nlohmann::json;

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error("routing: " + what); }

std::string contentOf(const std::string& file) {
  std::ifstream stream(file);
  if (!stream) refuse("cannot read " + file);
  std::stringstream content;
  content << stream.rdbuf();
  return content.str();
}

// "FILE#PART" to both; the last '#' counts.
std::pair<std::string, std::string> fileAndPart(const std::string& text) {
  std::size_t hash = text.rfind('#');
  if (hash == std::string::npos) return {text, ""};
  return {text.substr(0, hash), text.substr(hash + 1)};
}

void appendRow(const json& row, int& topk, std::vector<std::int32_t>& out, const std::string& where) {
  if (topk == 0) topk = static_cast<int>(row.size());
  if (topk == 0 || static_cast<int>(row.size()) != topk)
    refuse(fmt::format("{}: a token has {} expert ids, the first one has {}", where, row.size(), topk));
  for (const json& id : row) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < -1 || id.get<std::int64_t>() > (1 << 20))
      refuse(where + ": an expert id is no integer of -1 or more");
    out.push_back(id.get<std::int32_t>());
  }
}

bool isTable(const json& value) { return value.is_array() && !value.empty() && value[0].is_array(); }

// Takes every token out of what a line holds: [ids], [[ids], ...], or deeper.
void appendTokens(const json& value, int& topk, std::vector<std::int32_t>& out, const std::string& where) {
  if (isTable(value)) {
    for (const json& inner : value) appendTokens(inner, topk, out, where);
  } else if (value.is_array() && !value.empty()) {
    appendRow(value, topk, out, where);
  }
}

const json* tokensIn(const json& line) {
  if (line.is_array()) return &line;
  if (!line.is_object()) return nullptr;
  for (const char* key : {"topk_ids", "expert_ids", "experts", "selected_experts", "routed_experts", "topk_indices",
                          "routing_map", "ids", "indices"}) {
    auto found = line.find(key);
    if (found != line.end() && found->is_array()) return &*found;
  }
  return nullptr;
}

}  // namespace

void RoutingSource::readCounts(const std::string& specification) {
  auto [file, part] = fileAndPart(specification);
  std::istringstream parts(part);
  std::string model, set, layer;
  if (!std::getline(parts, model, '/') || !std::getline(parts, set, '/') || !std::getline(parts, layer, '/'))
    refuse("counts wants FILE#MODEL/SET/LAYER, as in counts:expert-counts.json#OLMoE-1B-7B/c4/0");
  json content = json::parse(contentOf(file), nullptr, false);
  if (content.is_discarded()) refuse(file + " is not JSON");
  std::string reached = "models";
  try {
    const json& found = content.at("models").at(model);
    reached = model + " (sets: ";
    for (const auto& [key, value] : found.at("counts").items()) reached += key + " ";
    reached += ")";
    const json& counts = found.at("counts").at(set).at(layer);
    int topk = found.at("topk").get<int>(), experts = found.at("experts").get<int>();
    if (options_.topkGiven && options_.topk != topk)
      refuse(fmt::format("--topk {} was given, {} has top-{}", options_.topk, model, topk));
    if (options_.expertsGiven && options_.experts != experts)
      refuse(fmt::format("--experts {} was given, {} has {}", options_.experts, model, experts));
    topk_ = topk;
    experts_ = experts;
    std::vector<double> weights = counts.get<std::vector<double>>();
    if (static_cast<int>(weights.size()) != experts_) refuse(file + ": as many counts as experts are needed");
    setPopularity(weights);
  } catch (const json::exception&) {
    refuse(fmt::format("{} has no {}/{}/{}; found {}", file, model, set, layer, reached));
  }
  remark_ = fmt::format("drawn from the expert counts of {} on {}, layer {}: which experts go together is lost", model,
                        set, layer);
}

void RoutingSource::readTrace(const std::string& specification) {
  auto [file, part] = fileAndPart(specification);
  std::string content = contentOf(file);
  kind_ = Kind::trace;
  int topk = 0, experts = 0;
  json whole = json::parse(content, nullptr, false);
  if (!whole.is_discarded() && whole.is_object() && whole.contains("layers")) {
    const json& layers = whole["layers"];
    experts = whole.value("experts", 0);
    if (part.empty()) {
      appendTokens(layers, topk, trace_, file);
      remark_ = fmt::format("recorded tokens of all {} layers of {}", layers.size(), file);
    } else {
      std::size_t layer = layers.size();
      if (part.find_first_not_of("0123456789") == std::string::npos && part.size() < 6) layer = std::stoul(part);
      if (layer >= layers.size()) refuse(fmt::format("{} has layers 0 to {}, not '{}'", file, layers.size() - 1, part));
      appendTokens(layers[layer], topk, trace_, file);
      remark_ = fmt::format("recorded tokens of layer {} of {}", part, file);
    }
  } else {
    std::istringstream lines(content);
    int number = 0;
    for (std::string line; std::getline(lines, line);) {
      ++number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      std::string where = fmt::format("{} line {}", file, number);
      json value = json::parse(line, nullptr, false);
      if (value.is_discarded()) refuse(where + " is not JSON");
      if (!part.empty() && value.is_object()) {
        // Recorders name the layer in each line; a part picks one.
        for (const char* key : {"layer", "layer_id", "layer_idx"})
          if (value.contains(key) && value[key].dump() != part) value = json();
        if (value.is_null()) continue;
      }
      const json* tokens = tokensIn(value);
      if (tokens == nullptr)
        refuse(where + " has no list of expert ids (topk_ids, expert_ids, experts, selected_experts, ...)");
      appendTokens(*tokens, topk, trace_, where);
    }
    remark_ = fmt::format("recorded tokens of {}", file);
  }
  if (trace_.empty()) refuse(file + " holds no tokens" + (part.empty() ? "" : " of layer " + part));
  int highest = *std::max_element(trace_.begin(), trace_.end());
  if (experts == 0) experts = options_.expertsGiven ? options_.experts : highest + 1;
  if (options_.expertsGiven && options_.experts != experts)
    refuse(fmt::format("--experts {} was given, {} has {}", options_.experts, file, experts));
  if (options_.topkGiven && options_.topk != topk)
    refuse(fmt::format("--topk {} was given, {} has top-{}", options_.topk, file, topk));
  if (highest >= experts) refuse(fmt::format("{} has expert id {} of {} experts", file, highest, experts));
  topk_ = topk;
  experts_ = experts;
  remark_ += fmt::format(" ({} tokens, repeated as needed)", trace_.size() / static_cast<std::size_t>(topk_));
}

}  // namespace fusco::bench
