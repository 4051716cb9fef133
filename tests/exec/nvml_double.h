// What the test of exec/nvml.cc says to the double of the library.
#pragma once

#define FUSCO_DOUBLE __attribute__((visibility("default")))

// Of reads (0) or writes (1); negative: the question fails with that number.
FUSCO_DOUBLE void sayStatus(int from, int to, int capability, int status);
FUSCO_DOUBLE int nvmlCalls();
