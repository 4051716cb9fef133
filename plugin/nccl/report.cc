#include "plugin/nccl/report.h"

#include <mutex>
#include <set>

namespace fusco::nccl {

namespace {

std::string& lastErrorText() { return ofThisThread<std::string, struct LastError>(); }

// What the core has logged already.
class Said : public Error {
  using Error::Error;
};

}  // namespace

std::string setting(const char* name) {
  const char* value = "";
  fuscoGetSetting(name, &value);
  return value;
}

long long numberSetting(const char* name) { return std::stoll(setting(name)); }

void info(const std::string& text) { fuscoLog(fuscoLogInfo, ("nccl: " + text).c_str()); }
void warn(const std::string& text) { fuscoLog(fuscoLogWarn, ("nccl: " + text).c_str()); }

void warnOnce(const std::string& subject, const std::string& text) {
  static std::mutex mutex;
  // Never destroyed: threads may call while the process ends.
  static auto& said = *new std::set<std::string>;
  {
    std::lock_guard lock(mutex);
    if (!said.insert(subject).second) return;
  }
  warn(text);
}

void setLastError(const std::string& text) { lastErrorText() = text; }
const std::string& lastError() { return lastErrorText(); }

void check(fuscoResult_t result) {
  if (result != fuscoSuccess) throw Said(static_cast<Code>(result), fuscoGetLastError(nullptr));
}

ncclResult_t guarded(const char* name, const std::function<void()>& body) {
  Code code = Code::internalError;
  try {
    body();
    return ncclSuccess;
  } catch (const Said& error) {
    setLastError(std::string(name) + ": " + error.what());
    return static_cast<ncclResult_t>(error.code());
  } catch (const Error& error) {
    code = error.code();
    setLastError(std::string(name) + ": " + error.what());
  } catch (const std::bad_alloc&) {
    code = Code::systemError;
    setLastError(std::string(name) + ": memory is short");
  } catch (const std::exception& error) {
    setLastError(std::string(name) + ": " + error.what());
  }
  warn(lastError());
  return static_cast<ncclResult_t>(code);
}

}  // namespace fusco::nccl
