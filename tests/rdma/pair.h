// The two ends of a link by queue pairs in one process: rxe0 and rxe2 of the soft-RoCE machine, or rxe1 and rxe3.
#pragma once

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "base/status.h"
#include "transport/link_pair.h"
#include "transport/verbs/verbs.h"

namespace fusco::transport::testing {

struct VerbsPair final : LinkPair {
  VerbsPair(int slots, std::size_t slotBytes, int wire = 0) {
    for (int i = 0; i < 2; ++i) {
      reactors[i] = std::make_unique<Reactor>();
      nics[i] = VerbsNics::open();
      if (nics[i]->count() != 4) throw std::runtime_error("this is not the soft-RoCE machine");
      nics[i]->serve(*reactors[i]);
      links[i] = nics[i]->link(2 * i + wire, {slotBytes, slots, 1, {}, [=, this] { bells[i].ring(); }});
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
