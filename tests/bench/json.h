// JSON that programs wrote, read by nlohmann/json, which only json.cc includes: every file that does takes six seconds
// more to compile.
#pragma once

#include <cstddef>
#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

class Json {
 public:
  // What is not JSON gives a value that is neither an array nor an object.
  static Json parse(const std::string& text);
  static Json ofFile(const std::string& path);

  bool isArray() const;
  std::size_t size() const;
  bool contains(const char* key) const;
  // Throw where there is no such part.
  Json operator[](int index) const;
  Json operator[](const char* key) const;
  // Its parts, of an array or an object.
  std::vector<Json> items() const;
  // Throw where it is something else.
  std::string text() const;
  double number() const;
  std::string dump() const;

 private:
  struct Node;
  explicit Json(std::shared_ptr<const Node> node) : node_(std::move(node)) {}
  std::shared_ptr<const Node> node_;
};

bool operator==(const Json& json, const std::string& text);
void PrintTo(const Json& json, std::ostream* out);
