// Links by queue pairs, in the soft-RoCE machine: what every link does, and what is particular to these.
#include "rdma/pair.h"
#include "transport/link_cases.h"

namespace fusco::transport {
namespace {

using testing::VerbsPair;

const Medium kMedia[] = {
    {"queuePairs",
     [](int slots, std::size_t slotBytes) -> std::unique_ptr<LinkPair> {
       return std::make_unique<VerbsPair>(slots, slotBytes);
     }},
};

INSTANTIATE_TEST_SUITE_P(Verbs, Link, ::testing::ValuesIn(kMedia),
                         [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace fusco::transport
