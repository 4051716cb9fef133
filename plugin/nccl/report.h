// Settings, log and errors of libfusco: all by way of libfusco_core, so that a process has one of each.
#pragma once

#include <functional>
#include <string>

#include "base/status.h"
#include "base/thread.h"
#include "fusco/nccl_api.h"

namespace fusco::nccl {

std::string setting(const char* name);
// Where a number is expected.
long long numberSetting(const char* name);

void info(const std::string& text);
void warn(const std::string& text);
// Says it once for each subject.
void warnOnce(const std::string& subject, const std::string& text);

// What ncclGetLastError tells this thread.
void setLastError(const std::string& text);
const std::string& lastError();

// Throws what a call of fusco.h said.
void check(fuscoResult_t result);

// Runs a body and turns what it throws into a code, a warning and this thread's last error.
ncclResult_t guarded(const char* name, const std::function<void()>& body);

}  // namespace fusco::nccl
