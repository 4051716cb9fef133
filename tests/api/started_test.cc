// Operations that were started, and do not end as their caller wished.
#include <algorithm>

#include "api/worlds.h"

namespace fusco::test {
namespace {

// A start that was refused is none: nothing is carried out later, when its caller uses the tensors for something else.
TEST(Started, whatNoThreadCouldBeHadForIsNotCarriedOut) {
  runWell({"one process", 1, 1, {}, true, 16384}, [](Rank& self) {
    becomeNobody();
    fuscoComm_t comm = self.connect();
    const Routing routing(8, 1, 1);
    fuscoPlan_t plan = routing.make(comm);
    std::vector<char> in(8 * 64, 7), refused(8 * 64, 1), out(8 * 64, 1);
    {
      const NoMoreThreads none;
      fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
      args.input = in.data();
      args.output = refused.data();
      args.rowBytes = 64;
      requireContains(EXPECT_CODE(fuscoDispatchStart(plan, &args, nullptr), fuscoSystemError), "ulimit -u");
    }
    FUSCO_OK(fuscoDispatch(plan, in.data(), out.data(), 64, nullptr));
    REQUIRE(out == in);
    REQUIRE(std::all_of(refused.begin(), refused.end(), [](char c) { return c == 1; }));
    EXPECT_CODE(fuscoFinish(plan), fuscoInvalidUsage);
    FUSCO_OK(fuscoPlanDestroy(plan));
    shuffleWorks(self, comm);
    leave(comm);
  });
}

}  // namespace
}  // namespace fusco::test
