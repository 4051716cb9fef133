// libibverbs, opened when it is first needed. What <infiniband/verbs.h> defines inline works on what these hand out.
#pragma once

#include <infiniband/verbs.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace fusco::transport {

struct VerbsLibrary {
  decltype(&::ibv_get_device_list) getDeviceList;
  decltype(&::ibv_free_device_list) freeDeviceList;
  decltype(&::ibv_get_device_name) getDeviceName;
  decltype(&::ibv_open_device) openDevice;
  decltype(&::ibv_close_device) closeDevice;
  decltype(&::ibv_query_device) queryDevice;
  int (*queryPort)(ibv_context* context, std::uint8_t port, _compat_ibv_port_attr* attributes);
  decltype(&::ibv_alloc_pd) allocPd;
  decltype(&::ibv_dealloc_pd) deallocPd;
  ibv_mr* (*regMr)(ibv_pd* domain, void* address, std::size_t bytes, int access);
  decltype(&::ibv_reg_dmabuf_mr) regDmaBufMr;  // null: it is too old
  decltype(&::ibv_dereg_mr) deregMr;
  decltype(&::ibv_create_comp_channel) createCompChannel;
  decltype(&::ibv_destroy_comp_channel) destroyCompChannel;
  decltype(&::ibv_create_cq) createCq;
  decltype(&::ibv_destroy_cq) destroyCq;
  decltype(&::ibv_get_cq_event) getCqEvent;
  decltype(&::ibv_ack_cq_events) ackCqEvents;
  decltype(&::ibv_create_qp) createQp;
  decltype(&::ibv_modify_qp) modifyQp;
  decltype(&::ibv_destroy_qp) destroyQp;
  decltype(&::ibv_get_async_event) getAsyncEvent;
  decltype(&::ibv_ack_async_event) ackAsyncEvent;
  decltype(&::ibv_wc_status_str) statusText;
  decltype(&::ibv_event_type_str) eventText;
};

// Null, and why, where there is none. Never closed again.
const VerbsLibrary* verbsLibrary(std::string* why);
// For tests: what verbsLibrary() returns from now on; null: the library again.
void standInForVerbs(const VerbsLibrary* standIn);

}  // namespace fusco::transport
