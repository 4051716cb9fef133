// Which ports there are, and those that a rank opens.
#include <sched.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>

#include "base/environment.h"
#include "base/log.h"
#include "base/status.h"
#include "transport/verbs/link.h"
#include "transport/verbs/nic.h"
#include "transport/verbs/place.h"

namespace fusco::transport {

namespace {

// A line of a file of sysfs; empty where there is none. Entries of an address table that are not set give errors.
std::string lineOf(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool parseGid(const std::string& text, GidBytes* gid) {
  std::string digits;
  std::copy_if(text.begin(), text.end(), std::back_inserter(digits), [](char c) { return c != ':'; });
  if (digits.size() != 32) return false;
  for (std::size_t i = 0; i < 16; ++i) {
    const char* at = digits.data() + 2 * i;
    if (std::from_chars(at, at + 2, (*gid)[i], 16).ptr != at + 2) return false;
  }
  return true;
}

std::vector<GidEntry> gidsOf(const std::string& folder, int count) {
  std::vector<GidEntry> entries;
  for (int i = 0; i < count; ++i) {
    const std::string number = std::to_string(i);
    GidEntry entry;
    entry.index = i;
    if (!parseGid(lineOf(folder + "/gids/" + number), &entry.gid) || entry.empty()) continue;
    const std::string type = lineOf(folder + "/gid_attrs/types/" + number);
    entry.roceVersion = type == "RoCE v2" ? 2 : type == "IB/RoCE v1" ? 1 : 0;
    entry.interface = lineOf(folder + "/gid_attrs/ndevs/" + number);
    entries.push_back(std::move(entry));
  }
  return entries;
}

GidWish wishedGid() {
  const Environment& e = environment();
  GidWish wish;
  wish.index = static_cast<int>(e.number(Setting::ibGidIndex));
  wish.roceVersion = static_cast<int>(e.number(Setting::ibRoceVersion));
  wish.family = e.number(Setting::ibAddressFamily) == 1 ? 6 : 4;
  wish.range = e.text(Setting::ibAddressRange);
  return wish;
}

const char* stateText(ibv_port_state state) {
  switch (state) {
    case IBV_PORT_DOWN:
      return "down";
    case IBV_PORT_INIT:
      return "not configured by a subnet manager yet";
    case IBV_PORT_ARMED:
      return "armed";
    case IBV_PORT_ACTIVE:
      return "active";
    default:
      return "in no usable state";
  }
}

class Nics final : public VerbsNics {
 public:
  explicit Nics(const VerbsLibrary& verbs) : verbs_(verbs) {}

  int count() const override { return static_cast<int>(nics_.size()); }
  void tryMemory(std::size_t bytes) override;
  bool useGpuMemory(std::shared_ptr<GpuMemory> gpu, std::string* how) override;
  bool infiniband() const override { return nics_.front()->infiniband(); }
  std::string describe(int nic) const override { return nicAt(nic).describe(); }
  int nearest(int turn) const override { return near_[static_cast<std::size_t>(turn) % near_.size()]; }
  void serve(Reactor& reactor) override {
    reactor_ = &reactor;
    for (const auto& nic : nics_) nic->serve(reactor);
  }
  void forgetWindow(std::uint32_t id) override {
    for (const auto& nic : nics_) nic->forgetWindow(id);
  }
  void knowShared(const void* address, std::size_t bytes) override {
    for (const auto& nic : nics_) nic->knowShared(address, bytes);
  }
  void forgetShared(const void* address) override {
    for (const auto& nic : nics_) nic->forgetShared(address);
  }
  std::unique_ptr<VerbsLink> link(int nic, NetworkLinkOptions options) override {
    std::vector<Nic*> all;
    for (const auto& one : nics_) all.push_back(one.get());
    return std::make_unique<QueuePairLink>(*reactor_, std::move(all), nic, std::move(options), gpu_);
  }

  void findNearest();
  // Opens what can be used; what cannot is told in looked().
  void find(const std::string& devices);
  const std::string& looked() const { return looked_; }

 private:
  Nic& nicAt(int nic) const { return *nics_[static_cast<std::size_t>(nic)]; }
  void look(ibv_device* device, const HcaFilter& filter);
  void lookAtPort(ibv_device* device, int port, const ibv_port_attr& attributes, std::size_t place);
  void note(const std::string& text) { looked_ += (looked_.empty() ? "" : "; ") + text; }

  const VerbsLibrary& verbs_;
  Reactor* reactor_ = nullptr;
  std::vector<std::unique_ptr<Nic>> nics_;
  std::vector<std::size_t> places_;  // in the filter's list, by nic
  std::shared_ptr<GpuMemory> gpu_;   // null: slots lie in host memory
  std::vector<int> near_;
  std::string looked_;
};

void Nics::find(const std::string& wanted) {
  if (environment().flag(Setting::ibDisable)) return note("FUSCO_IB_DISABLE=1");
  int count = 0;
  ibv_device** devices = verbs_.getDeviceList(&count);
  const HcaFilter filter(wanted);
  for (int i = 0; i < count && devices != nullptr; ++i) {
    try {
      look(devices[i], filter);
    } catch (const Error& error) {
      note(error.what());
    }
  }
  if (devices != nullptr) verbs_.freeDeviceList(devices);
  if (count <= 0 || devices == nullptr) return note("this host has no RDMA devices");
  // The order of FUSCO_IB_HCA is that of the lanes; ports of one kind only, that of the first.
  std::vector<std::size_t> order(nics_.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return places_[a] < places_[b]; });
  std::vector<std::unique_ptr<Nic>> sorted;
  for (const std::size_t i : order) {
    if (!sorted.empty() && sorted.front()->infiniband() != nics_[i]->infiniband()) {
      note(nics_[i]->describe() + " is of another kind than " + sorted.front()->describe());
      continue;
    }
    sorted.push_back(std::move(nics_[i]));
  }
  nics_ = std::move(sorted);
  findNearest();
}

void Nics::findNearest() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (::sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) cores.push_back(core);
    }
  }
  const Place own = placeOfCores("/sys", cores);
  std::vector<Place> places;
  for (const auto& nic : nics_)
    places.push_back(placeOfFolder("/sys", "/class/infiniband/" + nic->device() + "/device"));
  near_ = transport::nearest(own, places);
  for (std::size_t i = 0; i < nics_.size(); ++i) {
    note(nics_[i]->describe() + " is " + nameOf(nearness(own, places[i])) + " to these cores");
  }
}

void Nics::look(ibv_device* device, const HcaFilter& filter) {
  const std::string name = verbs_.getDeviceName(device);
  if (device->transport_type == IBV_TRANSPORT_IWARP) return note(name + " is iWARP, which is not supported");
  ibv_context* context = verbs_.openDevice(device);
  if (context == nullptr) {
    return note(name + " cannot be opened: " + std::strerror(errno) + " (look at the permissions of /dev/infiniband)");
  }
  ibv_device_attr limits{};
  std::vector<ibv_port_attr> ports;
  if (verbs_.queryDevice(context, &limits) == 0) {
    for (int port = 1; port <= limits.phys_port_cnt; ++port) {
      ibv_port_attr attributes{};
      if (verbs_.queryPort(context, static_cast<std::uint8_t>(port),
                           reinterpret_cast<_compat_ibv_port_attr*>(&attributes)) != 0) {
        attributes.state = IBV_PORT_NOP;
      }
      ports.push_back(attributes);
    }
  }
  verbs_.closeDevice(context);
  for (std::size_t i = 0; i < ports.size(); ++i) {
    const int port = static_cast<int>(i) + 1;
    if (!filter.takes(name, port)) {
      note(name + " port " + std::to_string(port) + " is not in FUSCO_IB_HCA");
      continue;
    }
    lookAtPort(device, port, ports[i], static_cast<std::size_t>(filter.rankOf(name, port)));
  }
}

void Nics::lookAtPort(ibv_device* device, int port, const ibv_port_attr& attributes, std::size_t place) {
  const std::string name = std::string(verbs_.getDeviceName(device)) + " port " + std::to_string(port);
  if (attributes.state != IBV_PORT_ACTIVE) return note(name + " is " + stateText(attributes.state));
  const bool roce = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  const std::string folder = std::string(device->ibdev_path) + "/ports/" + std::to_string(port);
  // A queue pair names its entry with eight bits.
  const std::vector<GidEntry> gids = gidsOf(folder, std::min(attributes.gid_tbl_len, 256));
  const GidChoice choice = chooseGid(gids, wishedGid(), roce);
  if (choice.index < 0) return note(name + ": " + choice.why);
  const auto gid = std::find_if(gids.begin(), gids.end(), [&](const GidEntry& e) { return e.index == choice.index; });
  nics_.push_back(std::make_unique<Nic>(verbs_, device, port, attributes, *gid));
  places_.push_back(place);
  note(name + " is used with " + choice.why);
}

void Nics::tryMemory(std::size_t bytes) {
  for (const auto& nic : nics_) {
    Mapping memory = Mapping::anonymous(bytes);
    verbs_.deregMr(nic->registerMemory(memory.data(), bytes, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
  }
}

// By registering a page of it with each NIC, for what slots are registered for.
bool Nics::useGpuMemory(std::shared_ptr<GpuMemory> gpu, std::string* how) {
  constexpr std::size_t kTried = 65536;
  *how = "slots in host memory: ";
  if (gpu->flushing() == GpuMemory::Flush::impossible) {
    *how += gpu->name() + " reads what NICs have written only after a read by the NIC, which is not built";
    return false;
  }
  std::byte* memory = nullptr;
  try {
    memory = gpu->allocate(kTried);
  } catch (const Error& error) {
    *how += error.what();
    return false;
  }
  std::string ways, refused;
  for (const auto& nic : nics_) {
    const GpuRegion made = registerGpuMemory(verbs_, nic->domain(), *gpu, memory, kTried,
                                             IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (made.region == nullptr) {
      refused += (refused.empty() ? "" : "; ") + nic->describe() + " cannot register memory of " + gpu->name() + " (" +
                 made.why + ")";
      continue;
    }
    verbs_.deregMr(made.region);
    ways += (ways.empty() ? "" : "; ") + nic->describe() + " by " + made.by +
            (made.why.empty() ? "" : " (" + made.why + ")");
  }
  gpu->release(memory);
  if (!refused.empty()) {
    *how += refused;
    return false;
  }
  *how = "slots in memory of " + gpu->name() + ", registered with " + ways + "; " +
         (gpu->flushing() == GpuMemory::Flush::call ? "flushed by the driver before they are read"
                                                    : "read without a flush");
  gpu_ = std::move(gpu);
  return true;
}

}  // namespace

std::unique_ptr<VerbsNics> VerbsNics::open() { return open(environment().text(Setting::ibHca)); }

std::unique_ptr<VerbsNics> VerbsNics::open(const std::string& devices) {
  std::string why;
  const VerbsLibrary* verbs = verbsLibrary(&why);
  if (verbs == nullptr) fail(Code::systemError, why);
  auto nics = std::make_unique<Nics>(*verbs);
  nics->find(devices);
  FUSCO_INFO(kLogNet, "RDMA: {}", nics->looked());
  if (nics->count() == 0) fail(Code::systemError, "no RDMA port can be used: " + nics->looked());
  return nics;
}

}  // namespace fusco::transport
