// Messages on a TCP connection that both ends have proved themselves on: a head and bytes. Non-blocking both ways.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace fusco::comm {

class Frames {
 public:
  struct Head {
    std::uint32_t kind;
    std::uint32_t bytes;
  };
  enum class State { open, closed, malformed };
  using Handler = std::function<void(std::uint32_t kind, std::string_view body)>;

  // Longer frames than `most` are malformed.
  explicit Frames(std::size_t most) : most_(most) {}

  void queue(std::uint32_t kind, std::string_view body);
  void queue(std::uint32_t kind, std::initializer_list<std::string_view> parts);
  bool queued() const { return sent_ < out_.size(); }
  // Sends what the socket takes.
  State flush(int socket);
  // Hands over the frames that are complete. What errno says after `closed`: 0 for an end in order.
  State receive(int socket, const Handler& handler, int* error = nullptr);

 private:
  const std::size_t most_;
  std::string out_, in_;
  std::size_t sent_ = 0;
};

}  // namespace fusco::comm
