// The example of the README, which must be there word for word (readme_test.cc), as a program that checks its result.
// [readme]
#include <fusco/fusco.hpp>
#include <thread>

int main() {
  const fuscoUniqueId id = fusco::uniqueId();
  bool right[2] = {false, false};
  const auto rank = [&](int me) {
    fusco::Communicator comm(2, id, me);
    fusco::Plan plan(comm, {0, 3, 1, 2}, 2, 4);  // two tokens, each to two of four experts
    fusco::Buffer<float> tokens(2 * 8), atExperts(plan.receiveRows() * 8), back(2 * 8);
    for (float& x : tokens) x = float(me + 1);
    plan.dispatch(tokens, atExperts, 8);  // rows in expert order
    plan.combine(atExperts, back, 8);     // and back: the sum of both experts' rows
    right[me] = back[0] == 2 * tokens[0] && back[15] == 2 * tokens[15];
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
  return right[0] && right[1] ? 0 : 1;
}
// [/readme]
