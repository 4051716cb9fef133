#include "fuzz/fuzz.h"

#include <sys/stat.h>

extern "C" int LLVMFuzzerInitialize(int* argc, char*** argv) {
  // Nothing of the machine's settings, and no log of what strangers say.
  ::setenv("FUSCO_DEBUG", "NONE", 1);
  if (*argc < 3 || std::strcmp((*argv)[1], "--seeds") != 0) return 0;
  const std::string folder = (*argv)[2];
  ::mkdir(folder.c_str(), 0755);
  int number = 0;
  for (const std::string& seed : fusco::fuzz::seeds()) {
    std::ofstream file(folder + "/seed" + std::to_string(number++), std::ios::binary);
    if (!(file << seed)) {
      std::fprintf(stderr, "fuzz: cannot write to %s\n", folder.c_str());
      std::exit(1);
    }
  }
  return 0;
}
