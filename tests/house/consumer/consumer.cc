// One rank alone: a window, a plan, there and back.
#include <cstdio>
#include <fusco/fusco.hpp>

int main() try {
  const fusco::Communicator comm(1, fusco::uniqueId(), 0);
  fusco::Plan plan(comm, {1, 0, 0, 1}, 2, 2);
  fusco::Buffer<float> tokens(2 * 4), atExperts(plan.receiveRows() * 4), back(2 * 4);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = float(i);
  plan.dispatch(tokens, atExperts, 4);
  plan.combine(atExperts, back, 4);
  for (std::size_t i = 0; i < back.size(); ++i) {
    if (back[i] != 2 * tokens[i]) {
      std::printf("element %zu: %g, expected %g\n", i, double(back[i]), double(2 * tokens[i]));
      return 1;
    }
  }
  return 0;
} catch (const fusco::Exception& error) {
  std::printf("error %d: %s\n", int(error.code()), error.what());
  return 1;
}
