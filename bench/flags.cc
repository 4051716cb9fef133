#include "flags.h"

#include <CLI/CLI.hpp>

namespace fusco::bench {
namespace {

CLI::Option& of(void* option) { return *static_cast<CLI::Option*>(option); }

}  // namespace

struct Flags::Reader {
  Reader(const char* program, const char* description) : app(description, program) {}
  CLI::App app;
};

Flags::Flag& Flags::Flag::within(std::int64_t least, std::int64_t most) {
  of(option_).check(CLI::Range(least, most));
  return *this;
}

Flags::Flag& Flags::Flag::oneOf(const std::vector<std::string>& allowed) {
  of(option_).check(CLI::IsMember(allowed));
  return *this;
}

Flags::Flag& Flags::Flag::commas() {
  of(option_).delimiter(',');
  return *this;
}

Flags::Flag& Flags::Flag::showDefault() {
  of(option_).capture_default_str();
  return *this;
}

Flags::Flag& Flags::Flag::hidden() {
  of(option_).group("");
  return *this;
}

Flags::Flag& Flags::Flag::excludes(const char* other) {
  of(option_).excludes(other);
  return *this;
}

bool Flags::Flag::given() const { return of(option_).count() > 0; }

Flags::Flags(const char* program, const char* description) : reader_(std::make_unique<Reader>(program, description)) {
  reader_->app.set_help_flag("-h,--help", "Show this and leave");
}

Flags::~Flags() = default;

Flags::Flag Flags::add(const char* name, int& value, const char* help) {
  return Flag(reader_->app.add_option(name, value, help));
}

Flags::Flag Flags::add(const char* name, std::int64_t& value, const char* help) {
  return Flag(reader_->app.add_option(name, value, help));
}

Flags::Flag Flags::add(const char* name, std::uint64_t& value, const char* help) {
  return Flag(reader_->app.add_option(name, value, help));
}

Flags::Flag Flags::add(const char* name, std::string& value, const char* help) {
  return Flag(reader_->app.add_option(name, value, help));
}

Flags::Flag Flags::add(const char* name, std::vector<std::string>& value, const char* help) {
  return Flag(reader_->app.add_option(name, value, help));
}

Flags::Flag Flags::add(const char* name, bool& value, const char* help) {
  return Flag(reader_->app.add_flag(name, value, help));
}

bool Flags::parse(const std::vector<std::string>& words, int* exitCode, const std::function<void()>& check) {
  CLI::App& app = reader_->app;
  try {
    // CLI11 wants the words without the program's name, last one first.
    app.parse(std::vector<std::string>(words.rbegin(), words.rend() - (words.empty() ? 0 : 1)));
    try {
      if (check) check();
    } catch (const UsageError& error) {
      throw CLI::ValidationError(error.flag, error.what());
    }
  } catch (const CLI::ParseError& error) {
    *exitCode = app.exit(error) == 0 ? 0 : 2;
    return false;
  }
  return true;
}

}  // namespace fusco::bench
