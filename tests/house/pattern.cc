#include "house/pattern.h"

#include <regex>

namespace fusco::house {

struct Pattern::Compiled {
  std::regex expression;
};

Pattern::Pattern(const char* text) : compiled_(std::make_shared<Compiled>(Compiled{std::regex(text)})) {}

bool Pattern::isAll(const std::string& text) const { return std::regex_match(text, compiled_->expression); }

bool Pattern::isIn(const std::string& text) const { return std::regex_search(text, compiled_->expression); }

std::vector<std::string> Pattern::groupsIn(const std::string& text) const {
  std::smatch match;
  if (!std::regex_search(text, match, compiled_->expression)) return {};
  return {match.begin() + 1, match.end()};
}

std::vector<std::string> Pattern::firstGroups(const std::string& text) const {
  std::vector<std::string> found;
  for (std::sregex_iterator match(text.begin(), text.end(), compiled_->expression), end; match != end; ++match)
    found.push_back((*match)[1]);
  return found;
}

}  // namespace fusco::house
