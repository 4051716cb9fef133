// What a launcher has put into the environment of the processes that it started: who this one is, and how all of them
// can agree on a meeting place.
#pragma once

#include <string>

#include "base/environment.h"

namespace fusco {

struct Launch {
  std::string launcher;  // torchrun, Open MPI, ...
  int rank = -1;
  int ranks = 0;
  std::string address;  // host:port where rank 0 opens the meeting place
  std::string job;      // the same in all processes of the job, another one in other jobs
};

// Pure: from the variables of a process and the settings FUSCO_COMM_ID (or NCCL_COMM_ID). Throws Error(invalidUsage)
// that names what is missing.
Launch readLaunch(const Environment::Variables& variables, const std::string& commId);

// For this process.
Launch launchOfProcess();

// What the launcher calls the job, "" if it does not say.
std::string launchedJob();

}  // namespace fusco
