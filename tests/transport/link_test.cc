// Posted links that need nothing but this machine.
#include "transport/link_cases.h"

namespace fusco::transport {
namespace {

template <int kStreams, bool kOverTcp>
std::unique_ptr<LinkPair> makeTcp(int slots, std::size_t slotBytes) {
  return std::make_unique<testing::TcpPair>(slots, slotBytes, kStreams, kOverTcp);
}

const Medium kMedia[] = {
    {"ring",
     [](int slots, std::size_t slotBytes) -> std::unique_ptr<LinkPair> {
       return std::make_unique<testing::RingPair>(slots, slotBytes);
     }},
    {"socketPair", makeTcp<1, false>},
    {"threeSocketPairs", makeTcp<3, false>},
    {"tcp", makeTcp<1, true>},
    {"twoTcpStreams", makeTcp<2, true>},
};

INSTANTIATE_TEST_SUITE_P(All, Link, ::testing::ValuesIn(kMedia),
                         [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace fusco::transport
