// The two ends of a link by queue pairs in one process, each with its own devices of the soft-RoCE machine.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "transport/link_pair.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport::testing {

struct VerbsPair final : LinkPair {
  // `prepare` is called for the NICs of each end.
  VerbsPair(int slots, std::size_t slotBytes, std::array<const char*, 2> devices = {"=rxe0", "=rxe2"},
            const std::function<void(int end, VerbsNics& nics)>& prepare = {}) {
    for (int i = 0; i < 2; ++i) {
      reactors[i] = std::make_unique<Reactor>();
      nics[i] = VerbsNics::open(devices[static_cast<std::size_t>(i)]);
      nics[i]->serve(*reactors[i]);
      if (prepare) prepare(i, *nics[i]);
      links[i] = nics[i]->link(0, {slotBytes, slots, 1, {}, [=, this] { bells[i].ring(); }});
      ends[i] = links[i].get();
    }
    auto [one, other] = unixPair();
    links[0]->attach(0, std::move(one));
    links[1]->attach(0, std::move(other));
    for (int i = 0; i < 2; ++i) {
      if (!await(i, [&] { return links[i]->attached() || links[i]->state() != NetworkLink::State::open; }))
        throw std::runtime_error("a link did not come up");
    }
  }
  ~VerbsPair() override {
    // A test that stood still wants to know.
    for (int i = 0; i < 2; ++i) {
      if (::testing::Test::HasFailure() && links[i]->state() != NetworkLink::State::open)
        std::printf("end %d: %s\n", i, links[i]->failure().c_str());
    }
    links[0].reset();
    links[1].reset();
    nics[0].reset();
    nics[1].reset();
  }
  VerbsLink& link(int end) { return *links[end]; }
  std::unique_ptr<VerbsNics> nics[2];
  std::unique_ptr<VerbsLink> links[2];
};

}  // namespace fusco::transport::testing
