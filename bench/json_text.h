// JSON as programs write it, for people too: a member a line.
#pragma once

#include <fmt/format.h>

#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

namespace fusco::bench {

inline std::string jsonText(const std::string& text) {
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\')
      quoted += {'\\', c};
    else if (static_cast<unsigned char>(c) < 0x20)
      quoted += fmt::format("\\u{:04x}", static_cast<int>(c));
    else
      quoted += c;
  }
  return quoted + '"';
}
inline std::string jsonText(const char* text) { return jsonText(std::string(text)); }
inline std::string jsonText(bool value) { return value ? "true" : "false"; }
// With a decimal point; JSON has no other word than null for what is no number.
inline std::string jsonText(double value) { return std::isfinite(value) ? fmt::format("{:#}", value) : "null"; }
template <class Integer>
requires std::is_integral_v<Integer> std::string jsonText(Integer value) { return std::to_string(value); }
inline std::string jsonText(const std::vector<double>& values) {
  std::string text = "[";
  for (const double value : values) text += (text.size() > 1 ? ", " : "") + jsonText(value);
  return text + ']';
}

// Members in the order in which they were added.
class JsonObject {
 public:
  template <class Value>
  void add(const std::string& key, const Value& value) {
    addText(key, jsonText(value));
  }
  // What is JSON already.
  void addText(const std::string& key, const std::string& json) {
    members_ += (members_.empty() ? "" : ",\n ") + jsonText(key) + ": " + json;
  }
  std::string text() const { return "{" + members_ + "}"; }

 private:
  std::string members_;
};

inline std::string jsonArray(const std::vector<JsonObject>& objects) {
  std::string text = "[";
  for (const JsonObject& object : objects) text += (text.size() > 1 ? ",\n" : "\n") + object.text();
  return text + "\n]\n";
}

}  // namespace fusco::bench
