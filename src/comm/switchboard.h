// The TCP connections of one rank with other ranks: answers its listeners, calls others, and hands over what has proved
// itself. All of it happens on the reactor's thread and never waits for anyone.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/handle.h"
#include "comm/handshake.h"
#include "transport/tcp/address.h"
#include "transport/tcp/reactor.h"

namespace fusco::comm {

class Switchboard {
 public:
  // Whether a connection that holds the key is wanted; if so it is given to Take. Both run on the reactor's thread.
  using Judge = std::function<bool(const Purpose& purpose)>;
  using Take = std::function<void(const Purpose& purpose, UniqueFd socket)>;
  // The end of a call: a socket, or none and why; `refused` tells that the other end is who it should be and does not
  // want this connection.
  using Done = std::function<void(UniqueFd socket, bool refused, const std::string& why)>;
  // This process has no descriptors left: for a call, or since a second for those who call. From any thread.
  using Starve = std::function<void()>;

  Switchboard(transport::Reactor& reactor, const std::uint8_t key[32], std::vector<UniqueFd> listeners, Judge judge,
              Take take, Starve starve);
  ~Switchboard();

  // Connects to `to`, from an interface's address if `from` is one; the other end's machine has to answer before the
  // deadline. Its process may be stopped, or busy: that is waited for as long as its machine is there. From any thread.
  void call(const transport::Address& to, const transport::Address& from, const Purpose& purpose, Deadline deadline,
            Done done);

 private:
  static constexpr std::int64_t kPatienceMs = 10000;  // with who calls
  static constexpr int kSilenceMs = 8000;             // of the machine that is called
  static constexpr std::size_t kMostStrangers = 1024;
  static constexpr std::size_t kFewStrangers = 64;

  struct Pending {
    // An outgoing call, and an incoming one.
    Pending(UniqueFd begun, const std::uint8_t key[32], const Purpose& purpose, Deadline until, Done ended)
        : socket(std::move(begun)),
          handshake(Handshake::Side::caller, key, purpose),
          deadline(until),
          done(std::move(ended)),
          connecting(true) {}
    Pending(UniqueFd accepted, const std::uint8_t key[32])
        : socket(std::move(accepted)),
          handshake(Handshake::Side::host, key),
          deadline(Deadline::afterMs(kPatienceMs)) {}

    UniqueFd socket;
    Handshake handshake;
    Deadline deadline;
    Done done;  // empty for incoming ones
    bool connecting = false;
  };
  void acceptSome(int listener);
  void noteStarving(bool starving);
  void watch(std::unique_ptr<Pending> pending);
  void proceed(int descriptor);
  void dropLate();
  std::unique_ptr<Pending> extract(int descriptor);
  void finish(std::unique_ptr<Pending> pending, Handshake::Result result, const std::string& why);

  transport::Reactor& reactor_;
  std::uint8_t key_[32];
  const std::vector<UniqueFd> listeners_;
  const Judge judge_;
  const Take take_;
  const Starve starve_;
  Lasting starving_;  // the reactor's thread only
  std::mutex mutex_;
  std::map<int, std::unique_ptr<Pending>> pending_;  // by descriptor
  std::deque<int> strangers_;                        // incoming ones, oldest first; some have gone
  std::uint64_t timer_ = 0;
};

}  // namespace fusco::comm
