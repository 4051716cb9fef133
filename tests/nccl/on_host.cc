// In place of plugin/nccl/gpu.cc: device mode in front of a double of libnccl, carrying host memory. Everything of
// device mode but the GPU is then that of libfusco.so: votes, children, groups, ends.
#include "plugin/nccl/gpu.h"
#include "plugin/nccl/report.h"

namespace fusco::nccl {

const std::string& deviceReason() {
  static const std::string& none = *new std::string;
  return none;
}

fuscoComm_t makeDeviceEngine(const Communicator& communicator, const fuscoUniqueId& id, int timeoutMs) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceHost;
  config.initTimeoutMs = timeoutMs;
  fuscoComm_t engine = nullptr;
  check(fuscoCommInitRankConfig(&engine, communicator.ranks, id, communicator.rank, &config));
  return engine;
}

bool engineCaptures(fuscoComm_t) { return false; }

// Streams are numbers here: one of them stands for a capture.
bool captured(cudaStream_t stream) { return reinterpret_cast<std::uintptr_t>(stream) == 0xca97; }

}  // namespace fusco::nccl
