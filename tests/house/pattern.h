// Regular expressions (ECMAScript's, as std::regex has them) without <regex>: a file that uses it takes five seconds
// more to compile.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace fusco::house {

class Pattern {
 public:
  explicit Pattern(const char* text);
  // All of the text.
  bool isAll(const std::string& text) const;
  // Some part of it.
  bool isIn(const std::string& text) const;
  // What the first match has in its groups, from 1 on; empty: there is none.
  std::vector<std::string> groupsIn(const std::string& text) const;
  // Each match's first group, in order.
  std::vector<std::string> firstGroups(const std::string& text) const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
};

}  // namespace fusco::house
