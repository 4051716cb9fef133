// libnvidia-ml as exec/nvml.cc calls it: four GPUs, one of which may not be looked at. What each pair says is set by
// the test.
#include "exec/nvml_double.h"

#include <cstring>

namespace {
struct PciInfo {
  char oldBusId[16];
  unsigned domain, bus, device, deviceId, subsystemId;
  char busId[32];
};
int statuses[4][4][2];
int calls = 0;
int gpus[4];
int numberOf(void* device) { return static_cast<int>(static_cast<int*>(device) - gpus); }
bool ready = false;
}  // namespace

void sayStatus(int from, int to, int capability, int status) { statuses[from][to][capability] = status; }
int nvmlCalls() { return calls; }

extern "C" {
int nvmlInit_v2() {
  ready = true;
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 4;
  return ready ? 0 : 1;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
  *device = &gpus[index];
  return index == 3 ? 4 : 0;
}
int nvmlDeviceGetPciInfo_v3(void* device, PciInfo* info) {
  std::memset(static_cast<void*>(info), 0x7f, sizeof *info);
  info->domain = 1;
  info->bus = static_cast<unsigned>(0x10 + numberOf(device));
  info->device = 2;
  return 0;
}
int nvmlDeviceGetP2PStatus(void* from, void* to, int capability, int* status) {
  ++calls;
  if (capability < 0 || capability > 1 || from == to) return 2;
  const int said = statuses[numberOf(from)][numberOf(to)][capability];
  if (said < 0) return -said;
  *status = said;
  return 0;
}
}
