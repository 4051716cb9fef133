// Prints docs/environment.md.
#include <cstdio>

#include "base/environment.h"

int main() { return std::fputs(fusco::environmentMarkdown().c_str(), stdout) < 0; }
