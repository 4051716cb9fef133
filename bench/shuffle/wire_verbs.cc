// The wire alone by RDMA: what libibverbs does with as many bytes, without rows, slots, credits or anything of the
// library's.
#include <dlfcn.h>
#include <fmt/format.h>
#include <infiniband/verbs.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>

#include "shuffle/routing.h"
#include "shuffle/wire.h"

namespace fusco::bench {
namespace {

constexpr std::size_t kPiece = std::size_t{1} << 18;
constexpr int kInFlight = 64, kSignalEvery = 8;

[[noreturn]] void failed(const std::string& what) {
  throw std::runtime_error(fmt::format("the wire alone, by RDMA: {}: {}", what, std::strerror(errno)));
}

// The few calls that are needed; what the header defines inline works on what these hand out.
struct Verbs {
  decltype(&::ibv_get_device_list) devices;
  decltype(&::ibv_get_device_name) name;
  decltype(&::ibv_open_device) open;
  decltype(&::ibv_close_device) close;
  int (*queryPort)(ibv_context*, std::uint8_t, _compat_ibv_port_attr*);
  decltype(&::ibv_alloc_pd) allocPd;
  decltype(&::ibv_dealloc_pd) deallocPd;
  ibv_mr* (*regMr)(ibv_pd*, void*, std::size_t, int);
  decltype(&::ibv_dereg_mr) deregMr;
  decltype(&::ibv_create_cq) createCq;
  decltype(&::ibv_destroy_cq) destroyCq;
  decltype(&::ibv_create_qp) createQp;
  decltype(&::ibv_modify_qp) modifyQp;
  decltype(&::ibv_destroy_qp) destroyQp;
  decltype(&::ibv_wc_status_str) statusText;

  Verbs() {
    void* const library = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error(fmt::format("the wire alone, by RDMA: {}", dlerror()));
    const auto find = [&](auto& function, const char* symbol) {
      void* found = dlvsym(library, symbol, "IBVERBS_1.1");
      if (found == nullptr) found = dlvsym(library, symbol, "IBVERBS_1.0");
      if (found == nullptr) failed(std::string("libibverbs has no ") + symbol);
      std::memcpy(&function, &found, sizeof found);
    };
    find(devices, "ibv_get_device_list");
    find(name, "ibv_get_device_name");
    find(open, "ibv_open_device");
    find(close, "ibv_close_device");
    find(queryPort, "ibv_query_port");
    find(allocPd, "ibv_alloc_pd");
    find(deallocPd, "ibv_dealloc_pd");
    find(regMr, "ibv_reg_mr");
    find(deregMr, "ibv_dereg_mr");
    find(createCq, "ibv_create_cq");
    find(destroyCq, "ibv_destroy_cq");
    find(createQp, "ibv_create_qp");
    find(modifyQp, "ibv_modify_qp");
    find(destroyQp, "ibv_destroy_qp");
    find(statusText, "ibv_wc_status_str");
  }
};

std::string lineOf(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// The index of the first address that serves: RoCE v2 with IPv4, else the first. `gid` gets its bytes.
int chooseGid(const ibv_device& device, std::uint8_t (&gid)[16]) {
  const std::string port = std::string(device.ibdev_path) + "/ports/1";
  int best = 0;
  if (const char* wanted = std::getenv("FUSCO_IB_GID_INDEX")) {
    best = std::atoi(wanted);
  } else {
    for (int i = 255; i >= 0; --i) {
      const bool second = lineOf(fmt::format("{}/gid_attrs/types/{}", port, i)) == "RoCE v2";
      const std::string text = lineOf(fmt::format("{}/gids/{}", port, i));
      if (second && text.rfind("0000:0000:0000:0000:0000:ffff:", 0) == 0) best = i;
    }
  }
  std::string digits = lineOf(fmt::format("{}/gids/{}", port, best));
  digits.erase(std::remove(digits.begin(), digits.end(), ':'), digits.end());
  if (digits.size() != 32) failed(fmt::format("the device has no address {}", best));
  for (std::size_t i = 0; i < 16; ++i)
    gid[i] = static_cast<std::uint8_t>(std::stoi(digits.substr(2 * i, 2), nullptr, 16));
  return best;
}

class VerbsWire : public Implementation {
 public:
  explicit VerbsWire(const CaseContext& context) : context_(context) {
    for (const Crossing& one : crossingsOf(context)) pairs_.push_back({one});
    std::size_t most = 1;
    for (const Pair& p : pairs_) most = std::max({most, p.crossing.out, p.crossing.in});
    out_ = Buffer(most);
    in_ = Buffer(most);
    std::memset(out_.data(), 1, out_.size());
    std::memset(in_.data(), 2, in_.size());
    try {
      connect();
    } catch (...) {
      close();
      throw;
    }
  }
  ~VerbsWire() override { close(); }

  void run() override {
    for (Pair& p : pairs_) {
      p.posted = p.done = p.requests = 0;
      p.heard = p.crossing.in == 0;
    }
    for (bool open = true; open;) {
      open = false;
      for (Pair& p : pairs_) {
        while (p.posted < p.crossing.out && p.requests - p.done < kInFlight) post(p);
        take(p);
        open |= p.posted < p.crossing.out || p.done < p.requests || !p.heard;
      }
    }
  }

  std::span<std::byte> output() override { return in_.span(); }

 private:
  struct Pair {
    Crossing crossing;
    ibv_cq* queue = nullptr;
    ibv_qp* pair = nullptr;
    std::size_t posted = 0;
    std::uint64_t requests = 0, done = 0;
    bool heard = false;
    std::uint64_t early = 0;  // notices of the next run
  };

  WireEnd& endOf(int rank) { return context_.session->group(context_.group).ranks[rank].wire; }

  ibv_device* findDevice() {
    int count = 0;
    ibv_device** const all = verbs_.devices(&count);
    std::vector<ibv_device*> usable;
    std::string wanted = std::getenv("FUSCO_IB_HCA") != nullptr ? std::getenv("FUSCO_IB_HCA") : "";
    wanted.erase(0, wanted.find_first_not_of("="));
    for (int i = 0; i < count; ++i) {
      const std::string name = verbs_.name(all[i]);
      if (wanted.empty() || ("," + wanted + ",").find("," + name + ",") != std::string::npos) usable.push_back(all[i]);
    }
    if (usable.empty()) failed("there is no device " + wanted);
    const Options& o = *context_.options;
    int index = 0;
    for (int r = 0; r < context_.rank; ++r)
      index += nodeOfRank(r, o.ranks, o.nodes) == nodeOfRank(context_.rank, o.ranks, o.nodes);
    return usable[static_cast<std::size_t>(index) % usable.size()];
  }

  void connect() {
    ibv_device* const device = findDevice();
    WireEnd& own = endOf(context_.rank);
    const int gid = chooseGid(*device, own.gid);
    device_ = verbs_.open(device);
    ibv_port_attr port{};
    if (device_ == nullptr || verbs_.queryPort(device_, 1, reinterpret_cast<_compat_ibv_port_attr*>(&port)) != 0)
      failed("the device cannot be opened");
    domain_ = verbs_.allocPd(device_);
    if (domain_ == nullptr) failed("no protection domain");
    outRegion_ = verbs_.regMr(domain_, out_.data(), out_.size(), 0);
    inRegion_ = verbs_.regMr(domain_, in_.data(), in_.size(), IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    if (outRegion_ == nullptr || inRegion_ == nullptr) failed("memory cannot be registered (ulimit -l unlimited)");
    own.key = inRegion_->rkey;
    own.address = reinterpret_cast<std::uint64_t>(in_.data());
    own.localId = port.lid;
    own.mtu = port.active_mtu;
    for (Pair& p : pairs_) {
      p.queue = verbs_.createCq(device_, 2 * kInFlight, nullptr, nullptr, 0);
      ibv_qp_init_attr wanted{};
      wanted.send_cq = wanted.recv_cq = p.queue;
      wanted.qp_type = IBV_QPT_RC;
      wanted.cap = {kInFlight, 4, 1, 1, 0};
      p.pair = p.queue != nullptr ? verbs_.createQp(domain_, &wanted) : nullptr;
      if (p.pair == nullptr) failed("no queue pair");
      own.pairs[p.crossing.rank] = p.pair->qp_num;
      ibv_qp_attr init{};
      init.qp_state = IBV_QPS_INIT;
      init.port_num = 1;
      init.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
      modify(p, init, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);
      listen(p);
      listen(p);
    }
    context_.session->meet(context_.group);
    for (Pair& p : pairs_) bringUp(p, port, gid);
    context_.session->meet(context_.group);
  }

  void bringUp(Pair& p, const ibv_port_attr& port, int gid) {
    const WireEnd& peer = endOf(p.crossing.rank);
    ibv_qp_attr receive{};
    receive.qp_state = IBV_QPS_RTR;
    receive.path_mtu = static_cast<ibv_mtu>(std::min<std::uint32_t>(peer.mtu, port.active_mtu));
    receive.dest_qp_num = peer.pairs[context_.rank];
    receive.max_dest_rd_atomic = 1;
    receive.min_rnr_timer = 12;
    receive.ah_attr.port_num = 1;
    receive.ah_attr.dlid = static_cast<std::uint16_t>(peer.localId);
    receive.ah_attr.is_global = port.link_layer == IBV_LINK_LAYER_ETHERNET ? 1 : 0;
    std::memcpy(receive.ah_attr.grh.dgid.raw, peer.gid, sizeof peer.gid);
    receive.ah_attr.grh.sgid_index = static_cast<std::uint8_t>(gid);
    receive.ah_attr.grh.hop_limit = 255;
    modify(p, receive,
           IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
               IBV_QP_MIN_RNR_TIMER);
    ibv_qp_attr send{};
    send.qp_state = IBV_QPS_RTS;
    send.timeout = 18;
    send.retry_cnt = send.rnr_retry = 7;
    send.max_rd_atomic = 1;
    modify(
        p, send,
        IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
  }

  void modify(Pair& p, ibv_qp_attr& attributes, int mask) {
    errno = verbs_.modifyQp(p.pair, &attributes, mask);
    if (errno != 0) failed("a queue pair cannot be set up");
  }

  void listen(Pair& p) {
    ibv_recv_wr receive{}, *bad = nullptr;
    receive.wr_id = 1;
    errno = ibv_post_recv(p.pair, &receive, &bad);
    if (errno != 0) failed("a receive cannot be posted");
  }

  // The next piece; the last one tells the other end.
  void post(Pair& p) {
    const std::size_t bytes = std::min(kPiece, p.crossing.out - p.posted);
    const bool last = p.posted + bytes == p.crossing.out;
    ibv_sge piece{reinterpret_cast<std::uint64_t>(out_.data() + p.posted), static_cast<std::uint32_t>(bytes),
                  outRegion_->lkey};
    ibv_send_wr write{}, *bad = nullptr;
    write.sg_list = &piece;
    write.num_sge = 1;
    write.opcode = last ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE;
    write.wr.rdma.remote_addr = endOf(p.crossing.rank).address + p.posted;
    write.wr.rdma.rkey = endOf(p.crossing.rank).key;
    ++p.requests;
    if (last || p.requests % kSignalEvery == 0) write.send_flags = IBV_SEND_SIGNALED;
    // Its id tells which requests are done.
    write.wr_id = p.requests << 1;
    errno = ibv_post_send(p.pair, &write, &bad);
    if (errno != 0) failed("a write cannot be posted");
    p.posted += bytes;
  }

  void take(Pair& p) {
    ibv_wc completions[8];
    const int count = ibv_poll_cq(p.queue, 8, completions);
    for (int i = 0; i < count; ++i) {
      const ibv_wc& one = completions[i];
      if (one.status != IBV_WC_SUCCESS)
        throw std::runtime_error(fmt::format("the wire alone, by RDMA: {}", verbs_.statusText(one.status)));
      if ((one.wr_id & 1) == 0) {
        p.done = one.wr_id >> 1;
        continue;
      }
      listen(p);
      ++p.early;
    }
    // A peer that is one run ahead has told of it already.
    if (!p.heard && p.early > 0) {
      --p.early;
      p.heard = true;
    }
  }

  void close() {
    for (Pair& p : pairs_) {
      if (p.pair != nullptr) verbs_.destroyQp(p.pair);
      if (p.queue != nullptr) verbs_.destroyCq(p.queue);
    }
    pairs_.clear();
    if (outRegion_ != nullptr) verbs_.deregMr(outRegion_);
    if (inRegion_ != nullptr) verbs_.deregMr(inRegion_);
    if (domain_ != nullptr) verbs_.deallocPd(domain_);
    if (device_ != nullptr) verbs_.close(device_);
  }

  const CaseContext& context_;
  const Verbs verbs_;
  std::vector<Pair> pairs_;
  Buffer out_, in_;
  ibv_context* device_ = nullptr;
  ibv_pd* domain_ = nullptr;
  ibv_mr* outRegion_ = nullptr;
  ibv_mr* inRegion_ = nullptr;
};

}  // namespace

std::unique_ptr<Implementation> makeVerbsWire(const CaseContext& context) {
  return std::make_unique<VerbsWire>(context);
}

}  // namespace fusco::bench
