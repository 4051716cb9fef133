// Ranks as threads on one GPU, dealt to several nodes: what a dispatch and a combine take when rows cross nodes, and
// what as many TCP connections over loopback carry of the same bytes in the same run.
//
//   g++ -O2 -std=c++20 -Iinclude -I/usr/local/cuda/include -o nodes bench/gpu/nodes.cc -Lbuild/release/src -lfusco_core
//     -L/usr/local/cuda/lib64 -lcudart_static -ldl -lrt -lpthread
//   FUSCO_NET=tcp nodes [NODES RANKS_OF_A_NODE TOKENS HIDDEN ROUNDS SLICE_BYTES SLICES]        (2 4 4096 7168 10 1048576
//   4)
//
// Routing: top-8 of 256, uniform, planned once. Rows are BF16 and small whole numbers, experts give back what they got,
// so that an unweighted combine gives eight times each row exactly, and is compared.
#include <arpa/inet.h>
#include <cuda_runtime_api.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "fusco/fusco.h"

namespace {

constexpr int kTopk = 8, kExperts = 256;

void ok(bool fine, const std::string& what) {
  if (!fine) throw std::runtime_error(what);
}
#define FUSCO(call) ok((call) == fuscoSuccess, std::string(#call ": ") + fuscoGetLastError(nullptr))
#define CUDA(call) ok((call) == cudaSuccess, #call)

struct Setting {
  int nodes = 2, ofNode = 4, tokens = 4096, hidden = 7168, rounds = 10, sliceBytes = 1048576, slices = 4;
  int ranks() const { return nodes * ofNode; }
  std::size_t rowBytes() const { return static_cast<std::size_t>(hidden) * 2; }
};

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// What a rank measures; all ranks begin together, and the slowest counts.
struct Times {
  std::vector<std::vector<double>> dispatch, combine, wire;  // by rank
  std::vector<std::size_t> crossing;                         // bytes of rows that a rank gives to links
  std::vector<double> slowest(const std::vector<std::vector<double>>& of) const {
    std::vector<double> worst(of[0].size(), 0);
    for (const auto& rank : of)
      for (std::size_t i = 0; i < rank.size(); ++i) worst[i] = std::max(worst[i], rank[i]);
    return worst;
  }
};

// Sends `out[i]` bytes on each connection and receives `in[i]`, all at once, as one thread can.
void carry(const std::vector<int>& sockets, const std::vector<std::size_t>& out, const std::vector<std::size_t>& in,
           std::vector<char>& from, std::vector<char>& to) {
  std::vector<std::size_t> sent(sockets.size(), 0), got(sockets.size(), 0);
  for (;;) {
    std::vector<pollfd> polled;
    for (std::size_t i = 0; i < sockets.size(); ++i) {
      const int events = (sent[i] < out[i] ? POLLOUT : 0) | (got[i] < in[i] ? POLLIN : 0);
      if (events != 0) polled.push_back({sockets[i], static_cast<short>(events), 0});
    }
    if (polled.empty()) return;
    poll(polled.data(), polled.size(), -1);
    for (const pollfd& p : polled) {
      const auto i = static_cast<std::size_t>(std::find(sockets.begin(), sockets.end(), p.fd) - sockets.begin());
      const auto moved = [](ssize_t bytes) { return static_cast<std::size_t>(std::max<ssize_t>(0, bytes)); };
      if (p.revents & POLLOUT)
        sent[i] += moved(send(p.fd, from.data(), std::min(from.size(), out[i] - sent[i]), MSG_DONTWAIT));
      if (p.revents & POLLIN) got[i] += moved(recv(p.fd, to.data(), std::min(to.size(), in[i] - got[i]), MSG_DONTWAIT));
    }
  }
}

void runRank(const Setting& s, int rank, const fuscoUniqueId& id, std::barrier<>& together, Times& times,
             const std::vector<int>& sockets) {
  fuscoConfig_t config = FUSCO_CONFIG_INIT;
  config.device = fuscoDeviceCuda;
  config.nodeId = rank / s.ofNode;
  config.operationTimeoutMs = 20000;
  config.sliceBytes = s.sliceBytes;
  config.slices = s.slices;
  fuscoComm_t comm = nullptr;
  FUSCO(fuscoCommInitRankConfig(&comm, s.ranks(), id, rank, &config));
  cudaStream_t stream = nullptr;
  CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto tokens = static_cast<std::size_t>(s.tokens);
  std::mt19937 random(static_cast<unsigned>(rank));
  std::vector<std::int64_t> ids;
  for (std::size_t t = 0; t < tokens; ++t) {
    std::vector<std::int64_t> chosen;
    while (chosen.size() < kTopk) {
      const auto e = static_cast<std::int64_t>(random() % kExperts);
      if (std::find(chosen.begin(), chosen.end(), e) == chosen.end()) chosen.push_back(e);
    }
    ids.insert(ids.end(), chosen.begin(), chosen.end());
  }
  // BF16 of 0 to 15.
  std::vector<std::uint16_t> rows(tokens * static_cast<std::size_t>(s.hidden)), back(rows.size());
  const auto bf16 = [](float x) {
    std::uint32_t bits;
    static_assert(sizeof bits == sizeof x);
    __builtin_memcpy(&bits, &x, 4);
    return static_cast<std::uint16_t>(bits >> 16);
  };
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = bf16(static_cast<float>(random() % 16));
  void *idsThere = nullptr, *input = nullptr, *output = nullptr, *sums = nullptr;
  CUDA(cudaMalloc(&idsThere, ids.size() * 8));
  CUDA(cudaMalloc(&input, rows.size() * 2));
  CUDA(cudaMalloc(&sums, rows.size() * 2));
  CUDA(cudaMemcpyAsync(idsThere, ids.data(), ids.size() * 8, cudaMemcpyDefault, stream));
  CUDA(cudaMemcpyAsync(input, rows.data(), rows.size() * 2, cudaMemcpyDefault, stream));
  CUDA(cudaStreamSynchronize(stream));
  fuscoPlanConfig_t planned = FUSCO_PLAN_CONFIG_INIT;
  planned.expertIds = idsThere;
  planned.tokens = s.tokens;
  planned.topk = kTopk;
  planned.experts = kExperts;
  fuscoPlan_t plan = nullptr;
  FUSCO(fuscoPlanCreate(&plan, &planned, comm, stream));
  fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
  FUSCO(fuscoPlanGetInfo(plan, &info));
  CUDA(cudaMalloc(&output, static_cast<std::size_t>(info.receiveRows) * s.rowBytes()));
  fuscoDispatchArgs_t there = FUSCO_DISPATCH_INIT;
  there.input = input;
  there.output = output;
  there.rowBytes = s.rowBytes();
  fuscoCombineArgs_t home = FUSCO_COMBINE_INIT;
  home.input = output;
  home.output = sums;
  home.elements = static_cast<std::size_t>(s.hidden);
  home.datatype = fuscoBfloat16;
  home.weighted = 0;
  std::vector<char> out(std::size_t{1} << 19), in(std::size_t{1} << 19);
  const auto at = static_cast<std::size_t>(rank);
  times.crossing[at] = static_cast<std::size_t>(info.copiesRemote) * s.rowBytes();
  together.arrive_and_wait();
  std::vector<std::size_t> leaving, coming;
  for (int peer = rank % s.ofNode; peer < s.ranks(); peer += s.ofNode) {
    if (peer == rank) continue;
    leaving.push_back(times.crossing[at] / sockets.size());
    coming.push_back(times.crossing[static_cast<std::size_t>(peer)] / sockets.size());
  }
  const auto timed = [&](std::vector<double>* into, auto&& body) {
    together.arrive_and_wait();
    const double begin = seconds();
    body();
    CUDA(cudaStreamSynchronize(stream));
    if (into != nullptr) into->push_back(seconds() - begin);
  };
  for (int round = -2; round < s.rounds; ++round) {
    const bool counts = round >= 0;
    timed(counts ? &times.dispatch[at] : nullptr, [&] { FUSCO(fuscoDispatchEx(plan, &there, stream)); });
    timed(counts ? &times.combine[at] : nullptr, [&] { FUSCO(fuscoCombineEx(plan, &home, stream)); });
    timed(counts ? &times.wire[at] : nullptr, [&] { carry(sockets, leaving, coming, out, in); });
  }
  CUDA(cudaMemcpyAsync(back.data(), sums, back.size() * 2, cudaMemcpyDefault, stream));
  CUDA(cudaStreamSynchronize(stream));
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(rows[i]) << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    wrong += back[i] != bf16(8 * x);
  }
  fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
  FUSCO(fuscoCommGetStatistics(comm, &statistics));
  if (rank == 0) {
    std::printf(
        "rank 0: %lld rows cross, %lld stay; %llu slices; wire %.0f ms, wait %.0f ms, extract %.0f ms, place %.0f ms, "
        "sum %.0f ms in all rounds\n",
        static_cast<long long>(info.copiesRemote), static_cast<long long>(info.copiesLocal),
        static_cast<unsigned long long>(statistics.wireSlices), 1e-6 * static_cast<double>(statistics.wireNs),
        1e-6 * static_cast<double>(statistics.waitNs), 1e-6 * static_cast<double>(statistics.extractNs),
        1e-6 * static_cast<double>(statistics.placeNs), 1e-6 * static_cast<double>(statistics.sumNs));
  }
  if (wrong > 0) std::printf("rank %d: %zu wrong elements\n", rank, wrong);
  together.arrive_and_wait();
  FUSCO(fuscoPlanDestroy(plan));
  FUSCO(fuscoCommDestroy(comm));
  for (void* memory : {idsThere, input, output, sums}) cudaFree(memory);
  cudaStreamDestroy(stream);
}

// A connection between each two ranks of the same place in different nodes, over loopback.
std::vector<std::vector<int>> connections(const Setting& s) {
  std::vector<std::vector<int>> of(static_cast<std::size_t>(s.ranks()));
  for (int a = 0; a < s.ranks(); ++a) {
    for (int b = a + s.ofNode; b < s.ranks(); b += s.ofNode) {
      const int listener = socket(AF_INET, SOCK_STREAM, 0);
      sockaddr_in address{};
      address.sin_family = AF_INET;
      address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      socklen_t size = sizeof address;
      ok(bind(listener, reinterpret_cast<sockaddr*>(&address), size) == 0 && listen(listener, 1) == 0, "listen");
      getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
      const int one = socket(AF_INET, SOCK_STREAM, 0);
      ok(connect(one, reinterpret_cast<sockaddr*>(&address), size) == 0, "connect");
      const int other = accept(listener, nullptr, nullptr);
      close(listener);
      of[static_cast<std::size_t>(a)].push_back(one);
      of[static_cast<std::size_t>(b)].push_back(other);
    }
  }
  return of;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  Setting s;
  int* const fields[] = {&s.nodes, &s.ofNode, &s.tokens, &s.hidden, &s.rounds, &s.sliceBytes, &s.slices};
  for (int i = 1; i < argc && i <= 7; ++i) *fields[i - 1] = std::atoi(argv[i]);
  try {
    fuscoUniqueId id;
    FUSCO(fuscoGetUniqueId(&id));
    Times times;
    for (auto* of : {&times.dispatch, &times.combine, &times.wire}) of->resize(static_cast<std::size_t>(s.ranks()));
    times.crossing.assign(static_cast<std::size_t>(s.ranks()), 0);
    std::barrier<> together(s.ranks());
    const auto sockets = connections(s);
    std::vector<std::thread> threads;
    for (int r = 0; r < s.ranks(); ++r) {
      threads.emplace_back([&, r] {
        try {
          runRank(s, r, id, together, times, sockets[static_cast<std::size_t>(r)]);
        } catch (const std::exception& e) {
          std::fprintf(stderr, "rank %d: %s\n", r, e.what());
          std::_Exit(1);
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    const double wire = median(times.slowest(times.wire));
    std::printf("%d nodes of %d ranks, %d tokens, hidden %d, slices %d x %d, FUSCO_NET=%s, p50 of %d rounds\n", s.nodes,
                s.ofNode, s.tokens, s.hidden, s.slices, s.sliceBytes,
                std::getenv("FUSCO_NET") == nullptr ? "" : std::getenv("FUSCO_NET"), s.rounds);
    for (const auto& [name, of] : {std::pair{"dispatch", &times.dispatch}, std::pair{"combine", &times.combine},
                                   std::pair{"TCP alone", &times.wire}}) {
      const double t = median(times.slowest(*of));
      std::printf("  %-10s %8.2f ms  %5.1f %% of TCP alone\n", name, 1e3 * t, 100 * wire / t);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
