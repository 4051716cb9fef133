// The command line of a program, read by CLI11, which only flags.cc includes: every file that does takes ten seconds
// more to compile.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusco::bench {

// Words that do not go together, or mean nothing: what Flags::parse tells as it tells of its own.
struct UsageError : std::runtime_error {
  UsageError(std::string which, const std::string& what) : std::runtime_error(what), flag(std::move(which)) {}
  std::string flag;
};

class Flags {
 public:
  // What is known of one of them. Of the Flags that made it.
  class Flag {
   public:
    Flag& within(std::int64_t least, std::int64_t most);
    Flag& oneOf(const std::vector<std::string>& allowed);
    Flag& commas();  // several values, parted by commas
    Flag& showDefault();
    Flag& hidden();  // not in the help
    Flag& excludes(const char* other);
    bool given() const;

   private:
    friend class Flags;
    explicit Flag(void* option) : option_(option) {}
    void* option_;
  };

  Flags(const char* program, const char* description);
  ~Flags();

  // With a value each. What `value` holds is the default; it must stay where it is until parse.
  Flag add(const char* name, int& value, const char* help = "");
  Flag add(const char* name, std::int64_t& value, const char* help = "");
  Flag add(const char* name, std::uint64_t& value, const char* help = "");
  Flag add(const char* name, std::string& value, const char* help = "");
  Flag add(const char* name, std::vector<std::string>& value, const char* help = "");
  // Without one.
  Flag add(const char* name, bool& value, const char* help = "");

  // The program's name comes first. `check` looks at the values, and may throw UsageError. False: the help or what is
  // wrong has been printed, and *exitCode is 0 or 2.
  bool parse(const std::vector<std::string>& words, int* exitCode, const std::function<void()>& check = nullptr);

 private:
  struct Reader;
  std::unique_ptr<Reader> reader_;
};

}  // namespace fusco::bench
