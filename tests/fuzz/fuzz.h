// What all fuzz targets share. A target is a program of libFuzzer: `fuzz_x --seeds corpus -max_total_time=60`. With
// --seeds in front it first puts into that folder, where inputs are taken from and kept, what the library's own writers
// make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

namespace fusco::fuzz {

// Of the target: inputs to begin from.
std::vector<std::string> seeds();

// What must not be ends the run, and the input is kept.
inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

// Takes an input apart.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  bool empty() const { return size_ == 0; }
  std::size_t left() const { return size_; }
  std::uint8_t byte() { return size_ == 0 ? std::uint8_t{0} : static_cast<std::uint8_t>(take(1)[0]); }
  std::string_view take(std::size_t most) {
    const std::size_t count = most < size_ ? most : size_;
    const std::string_view taken(reinterpret_cast<const char*>(data_), count);
    data_ += count;
    size_ -= count;
    return taken;
  }
  // With its length in front.
  std::string_view piece() {
    const std::size_t low = byte(), high = byte();
    return take(low + 256 * (high % 16));
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
};

// The same the other way.
inline std::string pieceOf(std::string_view bytes) {
  return std::string{static_cast<char>(bytes.size() % 256), static_cast<char>(bytes.size() / 256)} + std::string(bytes);
}

}  // namespace fusco::fuzz
