#include "transport/verbs/library.h"

#include <dlfcn.h>

#include <atomic>
#include <type_traits>

namespace fusco::transport {

namespace {

struct Opened {
  VerbsLibrary functions{};
  bool there = false;
  std::string why;

  Opened() {
    void* handle = ::dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) {
      const char* text = ::dlerror();
      why = std::string("libibverbs cannot be opened (package libibverbs1): ") + (text != nullptr ? text : "no reason");
      return;
    }
    bool all = true;
    const auto find = [&](auto& function, const char* name) {
      void* found = ::dlvsym(handle, name, "IBVERBS_1.1");
      // What has not changed since has the older version only.
      if (found == nullptr) found = ::dlvsym(handle, name, "IBVERBS_1.0");
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
      if (found != nullptr || !all) return;
      all = false;
      why = std::string("libibverbs has no ") + name + "; install a newer one";
    };
    VerbsLibrary& f = functions;
    find(f.getDeviceList, "ibv_get_device_list");
    find(f.freeDeviceList, "ibv_free_device_list");
    find(f.getDeviceName, "ibv_get_device_name");
    find(f.openDevice, "ibv_open_device");
    find(f.closeDevice, "ibv_close_device");
    find(f.queryDevice, "ibv_query_device");
    find(f.queryPort, "ibv_query_port");
    find(f.allocPd, "ibv_alloc_pd");
    find(f.deallocPd, "ibv_dealloc_pd");
    find(f.regMr, "ibv_reg_mr");
    find(f.deregMr, "ibv_dereg_mr");
    find(f.createCompChannel, "ibv_create_comp_channel");
    find(f.destroyCompChannel, "ibv_destroy_comp_channel");
    find(f.createCq, "ibv_create_cq");
    find(f.destroyCq, "ibv_destroy_cq");
    find(f.getCqEvent, "ibv_get_cq_event");
    find(f.ackCqEvents, "ibv_ack_cq_events");
    find(f.createQp, "ibv_create_qp");
    find(f.modifyQp, "ibv_modify_qp");
    find(f.destroyQp, "ibv_destroy_qp");
    find(f.getAsyncEvent, "ibv_get_async_event");
    find(f.ackAsyncEvent, "ibv_ack_async_event");
    find(f.statusText, "ibv_wc_status_str");
    find(f.eventText, "ibv_event_type_str");
    void* const dmaBuf = ::dlsym(handle, "ibv_reg_dmabuf_mr");
    f.regDmaBufMr = reinterpret_cast<decltype(f.regDmaBufMr)>(dmaBuf);
    there = all;
  }
};

std::atomic<const VerbsLibrary*> inItsPlace{nullptr};

}  // namespace

void standInForVerbs(const VerbsLibrary* standIn) { inItsPlace = standIn; }

const VerbsLibrary* verbsLibrary(std::string* why) {
  if (const VerbsLibrary* standIn = inItsPlace) return standIn;
  static const Opened* const opened = new Opened;
  if (!opened->there && why != nullptr) *why = opened->why;
  return opened->there ? &opened->functions : nullptr;
}

}  // namespace fusco::transport
