#include "shuffle/routing.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>

#include "shuffle/pattern.h"

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

std::uint64_t mix(std::uint64_t value) { return mixed(value); }

std::uint64_t Random::next() {
  std::uint64_t result = mix(state_);
  state_ += 0x9e3779b97f4a7c15u;
  return result;
}

std::uint64_t Random::below(std::uint64_t bound) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next()) * bound) >> 64);
}

double Random::unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

int firstExpertOf(int rank, int ranks, int experts) {
  return rank * (experts / ranks) + std::min(rank, experts % ranks);
}

int rankOfExpert(int expert, int ranks, int experts) {
  int small = experts / ranks, larger = experts % ranks;
  if (expert < larger * (small + 1)) return expert / (small + 1);
  return larger + (expert - larger * (small + 1)) / small;
}

int nodeOfRank(int rank, int ranks, int nodes) {
  return static_cast<int>(static_cast<std::int64_t>(rank) * nodes / ranks);
}

RoutingSource::RoutingSource(const RoutingOptions& options)
    : options_(options), topk_(options.topk), experts_(options.experts) {
  const std::string& text = options.text;
  if (text == "uniform") {
  } else if (text == "single-node" || text == "other-node") {
    kind_ = Kind::singleNode;
    otherNode_ = text == "other-node";
    if (otherNode_ && options_.nodes < 2) refuse("other-node wants several nodes");
    for (int node = 0; node < options_.nodes; ++node) {
      int held = 0;
      for (int rank = 0; rank < options_.ranks; ++rank)
        if (nodeOfRank(rank, options_.ranks, options_.nodes) == node)
          held += firstExpertOf(rank + 1, options_.ranks, experts_) - firstExpertOf(rank, options_.ranks, experts_);
      if (held < topk_) refuse(fmt::format("{}: node {} holds {} experts, fewer than top-{}", text, node, held, topk_));
    }
  } else if (text == "imbalanced") {
    imbalanced_ = true;
    remark_ = "tokens of a rank scaled by 1.75 (first of its node) to 0.25 (last), uniform experts";
  } else if (text == "masked") {
    kind_ = Kind::masked;
    remark_ = "uniform, but of every eighth token nothing and of the others one slot in four is not routed (-1)";
  } else if (text == "one-expert") {
    kind_ = Kind::oneExpert;
    remark_ = "all slots of all tokens name one expert";
  } else if (text.rfind("zipf:", 0) == 0) {
    char* end = nullptr;
    double exponent = std::strtod(text.c_str() + 5, &end);
    if (end == text.c_str() + 5 || *end != 0 || !(exponent >= 0 && exponent <= 10))
      refuse("zipf wants an exponent from 0 to 10, as in zipf:1.2");
    std::vector<double> weights(static_cast<std::size_t>(experts_));
    for (int i = 0; i < experts_; ++i) weights[i] = std::pow(i + 1.0, -exponent);
    // Which experts are popular is drawn from the seed: they would all lie on the first rank otherwise.
    Random random(mix(options_.seed) ^ 0x5a1bf);
    for (int i = experts_ - 1; i > 0; --i)
      std::swap(weights[i], weights[random.below(static_cast<std::uint64_t>(i) + 1)]);
    setPopularity(weights);
  } else if (text.rfind("counts:", 0) == 0) {
    readCounts(text.substr(7));
  } else if (text.rfind("trace:", 0) == 0) {
    readTrace(text.substr(6));
  } else {
    refuse("'" + text +
           "' is not one of uniform, single-node, other-node, imbalanced, masked, one-expert, zipf:S, "
           "counts:FILE#MODEL/SET/LAYER, trace:FILE");
  }
  if (kind_ != Kind::trace && kind_ != Kind::oneExpert && topk_ > experts_)
    refuse(fmt::format("top-{} of {} experts: a token cannot have so many different ones", topk_, experts_));
  if (experts_ < options_.ranks)
    refuse(fmt::format("{} experts for {} ranks: each rank needs one at least", experts_, options_.ranks));
}

void RoutingSource::setPopularity(const std::vector<double>& weights) {
  kind_ = Kind::weighted;
  popularity_ = weights;
  cumulative_.resize(weights.size());
  double sum = 0;
  int usable = 0;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    sum += weights[i];
    usable += weights[i] > 0;
    cumulative_[i] = sum;
  }
  if (usable < topk_) refuse(fmt::format("only {} experts are ever used, fewer than top-{}", usable, topk_));
}

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

std::int64_t RoutingSource::tokensOf(std::int64_t tokens, int rank) const {
  if (!imbalanced_) return tokens;
  int node = nodeOfRank(rank, options_.ranks, options_.nodes), index = 0, size = 0;
  for (int r = 0; r < options_.ranks; ++r) {
    if (nodeOfRank(r, options_.ranks, options_.nodes) != node) continue;
    index += r < rank;
    ++size;
  }
  double weight = size == 1 ? 1.0 : 1.75 - 1.5 * index / (size - 1);
  return std::llround(static_cast<double>(tokens) * weight);
}

void RoutingSource::drawUniform(Random& random, int first, int count, std::int32_t* ids) const {
  for (int k = 0; k < topk_;) {
    auto id = static_cast<std::int32_t>(first + static_cast<int>(random.below(static_cast<std::uint64_t>(count))));
    if (std::find(ids, ids + k, id) == ids + k) ids[k++] = id;
  }
}

void RoutingSource::drawWeighted(Random& random, std::int32_t* ids) const {
  for (int k = 0; k < topk_; ++k) {
    // Draw from the rest: an expert that the token already has is drawn again; after many tries exactly.
    for (int attempt = 0;; ++attempt) {
      std::int32_t id = 0;
      if (attempt < 64) {
        double at = random.unit() * cumulative_.back();
        id = static_cast<std::int32_t>(std::upper_bound(cumulative_.begin(), cumulative_.end(), at) -
                                       cumulative_.begin());
        id = std::min(id, static_cast<std::int32_t>(experts_ - 1));
      } else {
        double left = 0;
        for (int e = 0; e < experts_; ++e)
          if (std::find(ids, ids + k, e) == ids + k) left += popularity_[e];
        double at = random.unit() * left;
        for (int e = 0; e < experts_; ++e) {
          if (std::find(ids, ids + k, e) != ids + k || popularity_[e] <= 0) continue;
          id = e;
          at -= popularity_[e];
          if (at < 0) break;
        }
      }
      if (popularity_[id] > 0 && std::find(ids, ids + k, id) == ids + k) {
        ids[k] = id;
        break;
      }
    }
  }
}

Routing RoutingSource::make(std::int64_t tokens, int rank) const {
  Routing routing;
  routing.tokens = tokensOf(tokens, rank);
  std::size_t slots = static_cast<std::size_t>(routing.tokens) * static_cast<std::size_t>(topk_);
  routing.ids.resize(slots);
  routing.weights.resize(slots);
  Random random(mix(mix(options_.seed) + static_cast<std::uint64_t>(rank) * 0x10001));
  std::int64_t before = 0;
  for (int r = 0; r < rank; ++r) before += tokensOf(tokens, r);
  std::size_t recorded = trace_.size() / static_cast<std::size_t>(topk_);

  // Experts of a node are contiguous, since its ranks are.
  std::vector<int> nodeStart(static_cast<std::size_t>(options_.nodes) + 1, experts_);
  for (int r = options_.ranks - 1; r >= 0; --r)
    nodeStart[nodeOfRank(r, options_.ranks, options_.nodes)] = firstExpertOf(r, options_.ranks, experts_);

  for (std::int64_t t = 0; t < routing.tokens; ++t) {
    std::int32_t* ids = routing.ids.data() + t * topk_;
    switch (kind_) {
      case Kind::uniform:
        drawUniform(random, 0, experts_, ids);
        break;
      case Kind::singleNode: {
        auto node = random.below(static_cast<std::uint64_t>(options_.nodes - (otherNode_ ? 1 : 0)));
        if (otherNode_ && static_cast<int>(node) >= nodeOfRank(rank, options_.ranks, options_.nodes)) ++node;
        drawUniform(random, nodeStart[node], nodeStart[node + 1] - nodeStart[node], ids);
        break;
      }
      case Kind::weighted:
        drawWeighted(random, ids);
        break;
      case Kind::masked:
        drawUniform(random, 0, experts_, ids);
        for (int k = 0; k < topk_; ++k)
          if (t % 8 == 7 || random.below(4) == 0) ids[k] = -1;
        break;
      case Kind::oneExpert:
        std::fill_n(ids, topk_, experts_ / 2);
        break;
      case Kind::trace: {
        std::size_t row = static_cast<std::size_t>(before + t) % recorded;
        std::copy_n(trace_.begin() + static_cast<std::ptrdiff_t>(row * topk_), topk_, ids);
        break;
      }
    }
    float* weights = routing.weights.data() + t * topk_;
    float sum = 0;
    for (int k = 0; k < topk_; ++k) sum += weights[k] = static_cast<float>(0.05 + random.unit());
    for (int k = 0; k < topk_; ++k) weights[k] /= sum;
  }
  return routing;
}

}  // namespace fusco::bench
