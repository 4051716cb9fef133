#include "bench/json.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>

struct Json::Node {
  nlohmann::json value;
};

Json Json::parse(const std::string& text) {
  return Json(std::make_shared<Node>(Node{nlohmann::json::parse(text, nullptr, false)}));
}

Json Json::ofFile(const std::string& path) {
  std::ifstream stream(path);
  return Json(std::make_shared<Node>(Node{nlohmann::json::parse(stream, nullptr, false)}));
}

bool Json::isArray() const { return node_->value.is_array(); }

std::size_t Json::size() const { return node_->value.size(); }

bool Json::contains(const char* key) const { return node_->value.contains(key); }

Json Json::operator[](int index) const {
  return Json(std::make_shared<Node>(Node{node_->value.at(static_cast<std::size_t>(index))}));
}

Json Json::operator[](const char* key) const { return Json(std::make_shared<Node>(Node{node_->value.at(key)})); }

std::vector<Json> Json::items() const {
  std::vector<Json> all;
  for (const nlohmann::json& item : node_->value) all.push_back(Json(std::make_shared<Node>(Node{item})));
  return all;
}

std::string Json::text() const { return node_->value.get<std::string>(); }

double Json::number() const { return node_->value.get<double>(); }

std::string Json::dump() const { return node_->value.dump(); }

bool operator==(const Json& json, const std::string& text) { return json.dump() == nlohmann::json(text).dump(); }

void PrintTo(const Json& json, std::ostream* out) { *out << json.dump(); }
