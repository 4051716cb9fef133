#include "exec/ranges.h"

#if FUSCO_HAS_NVTX
#include <nvtx3/nvToolsExt.h>
#endif

namespace fusco::exec {

#if FUSCO_HAS_NVTX

namespace {

nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t ours = nvtxDomainCreateA("FUSCO");
  return ours;
}

nvtxEventAttributes_t named(const char* name) {
  nvtxEventAttributes_t attributes{};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  return attributes;
}

}  // namespace

bool rangesBuilt() { return true; }

Range::Range(const char* name) {
  const nvtxEventAttributes_t attributes = named(name);
  nvtxDomainRangePushEx(domain(), &attributes);
}
Range::~Range() { nvtxDomainRangePop(domain()); }

#else

bool rangesBuilt() { return false; }
Range::Range(const char*) {}
Range::~Range() = default;

#endif

}  // namespace fusco::exec
