#include "plugin/nccl/gpu.h"

#include <dlfcn.h>

#include "plugin/nccl/report.h"

namespace fusco::nccl {

const std::string& deviceReason() {
  static const std::string& reason = *new std::string([] {
    fuscoDevice_t device = fuscoDeviceHost;
    const char* why = "";
    if (fuscoGetAutoDevice(&device, &why) == fuscoSuccess && device == fuscoDeviceCuda) return std::string();
    return std::string("this process moves no GPU memory: ") + why;
  }());
  return reason;
}

fuscoComm_t makeDeviceEngine(const Communicator& communicator, const fuscoUniqueId& id, int timeoutMs) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceCuda;
  config.gpu = communicator.device;
  config.initTimeoutMs = timeoutMs;
  fuscoComm_t engine = nullptr;
  check(fuscoCommInitRankConfig(&engine, communicator.ranks, id, communicator.rank, &config));
  for (int rank = 0; rank < communicator.ranks; ++rank) {
    int node = 0;
    const bool asked = communicator.wishes.carry || setting("FUSCO_CARRY") == "all";
    if (asked || (fuscoCommNode(engine, rank, &node) == fuscoSuccess && node == 0)) continue;
    fuscoCommAbort(engine);
    fail(Code::invalidUsage, "its ranks are on several nodes; FUSCO_CARRY=all would carry it all the same");
  }
  return engine;
}

bool engineCaptures(fuscoComm_t engine) {
  int captures = 0;
  return fuscoCommCapturesTransfers(engine, &captures) == fuscoSuccess && captures != 0;
}

// The program has a libcuda when it has streams. 0 is "not captured"; a stream that may not be asked now is not either.
bool captured(cudaStream_t stream) {
  using IsCapturing = int (*)(cudaStream_t, int*);
  static const auto ask = [] {
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
    return reinterpret_cast<IsCapturing>(driver == nullptr ? nullptr : dlsym(driver, "cuStreamIsCapturing"));
  }();
  int status = 0;
  return ask != nullptr && ask(stream, &status) == 0 && status != 0;
}

}  // namespace fusco::nccl
