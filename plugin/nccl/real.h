// The NCCL that libfusco stands in front of: found and opened once, at the first call that needs it.
#pragma once

#include <string>
#include <utility>

#include "fusco/nccl_api.h"
#include "plugin/nccl/functions.h"

namespace fusco::nccl {

// off: everything goes to the real library. host: nothing does. device: what is not carried does.
enum class Mode { off, host, device };
// By FUSCO_ENABLE and FUSCO_DEVICE, at the first call.
Mode mode();

// Where a function lies in the real library: pncclX, else ncclX; null if there is none.
void* realFunction(Function function);
// The file of the real library, "" if none was found.
std::string realLibrary();

// The answer for a function that nobody has: one warning for each, and this thread's last error.
ncclResult_t answerMissing(Function function);

// NCCL calls its own public names through the symbols that libfusco has taken. Such calls pass straight on: they come
// from this thread while it is inside the real library on our behalf, or from an address in its code.
bool insideReal(const void* returnAddress);
class InsideReal {
 public:
  InsideReal();
  ~InsideReal();
  InsideReal(const InsideReal&) = delete;
  InsideReal& operator=(const InsideReal&) = delete;
};

template <typename... Parameters, typename... Arguments>
ncclResult_t callReal(Function function, ncclResult_t (*)(Parameters...), Arguments&&... arguments) {
  void* const address = realFunction(function);
  if (address == nullptr) return answerMissing(function);
  const InsideReal inside;
  return reinterpret_cast<ncclResult_t (*)(Parameters...)>(address)(std::forward<Arguments>(arguments)...);
}
// FUSCO_REAL(Send, buffer, ...) calls the real ncclSend.
#define FUSCO_REAL(name, ...) \
  ::fusco::nccl::callReal(::fusco::nccl::Function::name, &::nccl##name __VA_OPT__(, ) __VA_ARGS__)

// Where the exported symbol of a function leads at this moment, resolved if it was not. For tests.
void* slotTarget(Function function);

}  // namespace fusco::nccl
