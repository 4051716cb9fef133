// Collectives of host mode against sums made here, and point-to-point operations in the manner of nccl-tests: aligned
// and not, in place, several in a group, in registered buffers and buffers of ncclMemAlloc, one thread for all ranks.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "nccl/program.h"

namespace fusco::test {

namespace {

const ncclRedOp_t kOperations[] = {ncclSum, ncclProd, ncclMin, ncclMax, ncclAvg};

template <typename T>
T expected(ncclRedOp_t operation, int ranks, std::size_t i, T (*input)(int, std::size_t)) {
  T value = input(0, i);
  for (int r = 1; r < ranks; ++r) {
    const T other = input(r, i);
    if (operation == ncclProd) value = static_cast<T>(value * other);
    if (operation == ncclMin) value = std::min(value, other);
    if (operation == ncclMax) value = std::max(value, other);
    if (operation == ncclSum || operation == ncclAvg) value = static_cast<T>(value + other);
  }
  return operation == ncclAvg ? static_cast<T>(value / static_cast<T>(ranks)) : value;
}

template <typename T>
T smallNumber(int rank, std::size_t i) {
  return static_cast<T>((i * 7 + static_cast<std::size_t>(rank) * 3) % 5 + 1);
}

template <typename T>
void reductions(const Rank& self, ncclComm_t comm, ncclDataType_t type) {
  const auto ranks = static_cast<std::size_t>(self.ranks);
  for (const std::size_t count : {std::size_t{0}, std::size_t{1}, std::size_t{3}, std::size_t{1000}}) {
    std::vector<T> in(count * ranks), out(count * ranks);
    for (std::size_t i = 0; i < in.size(); ++i) in[i] = smallNumber<T>(self.rank, i);
    for (const ncclRedOp_t op : kOperations) {
      const auto want = [&](std::size_t i) { return expected<T>(op, self.ranks, i, &smallNumber<T>); };
      const auto same = [&](const std::vector<T>& got, std::size_t first, std::size_t number, const char* what) {
        for (std::size_t i = 0; i < number; ++i) {
          if (got[i] != want(first + i))
            throw std::runtime_error(std::string(what) + ", type " + std::to_string(static_cast<int>(type)) +
                                     ", operation " + std::to_string(static_cast<int>(op)) + ", element " +
                                     std::to_string(i) + ": " + std::to_string(got[i]) + ", expected " +
                                     std::to_string(want(first + i)));
        }
      };
      OK(ncclAllReduce(in.data(), out.data(), count, type, op, comm, nullptr));
      same(out, 0, count, "all-reduce");
      out = in;
      OK(ncclAllReduce(out.data(), out.data(), count, type, op, comm, nullptr));
      same(out, 0, count, "all-reduce in place");
      OK(ncclReduceScatter(in.data(), out.data(), count, type, op, comm, nullptr));
      same(out, static_cast<std::size_t>(self.rank) * count, count, "reduce-scatter");
      const int root = self.ranks - 1;
      OK(ncclReduce(in.data(), self.rank == root ? out.data() : nullptr, count, type, op, root, comm, nullptr));
      if (self.rank == root) same(out, 0, count, "reduce");
    }
  }
}

// Bits of 1, 2, 3 and so on in formats that the language has not; sums of these are exact.
std::uint32_t bitsOf(ncclDataType_t type, int value) {
  if (value == 0) return 0;
  const int exponent = static_cast<int>(std::floor(std::log2(value)));
  const int fields[4][2] = {{5, 10}, {8, 7}, {4, 3}, {5, 2}};  // half, bfloat, e4m3, e5m2
  const int which = type == ncclFloat16 ? 0 : type == ncclBfloat16 ? 1 : type == kFloat8e4m3 ? 2 : 3;
  const int bias = (1 << (fields[which][0] - 1)) - 1, mantissa = fields[which][1];
  const auto fraction = static_cast<std::uint32_t>(value * (1 << mantissa) >> exponent) & ((1u << mantissa) - 1);
  return static_cast<std::uint32_t>(exponent + bias) << mantissa | fraction;
}

void smallFloats(const Rank& self, ncclComm_t comm) {
  for (const ncclDataType_t type : {ncclFloat16, ncclBfloat16, kFloat8e4m3, kFloat8e5m2}) {
    const std::size_t size = type == ncclFloat16 || type == ncclBfloat16 ? 2 : 1;
    std::vector<std::uint8_t> in(64 * size), out(64 * size);
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t bits = bitsOf(type, self.rank == 0 ? 1 + static_cast<int>(i % 2) : self.rank == 1 ? 1 : 0);
      std::memcpy(&in[i * size], &bits, size);
    }
    OK(ncclAllReduce(in.data(), out.data(), 64, type, ncclSum, comm, nullptr));
    for (std::size_t i = 0; i < 64; ++i) {
      std::uint32_t got = 0;
      std::memcpy(&got, &out[i * size], size);
      require(got == bitsOf(type, (self.ranks > 1 ? 2 : 1) + static_cast<int>(i % 2)),
              "a sum of small floats is wrong");
    }
  }
}

void movers(const Rank& self, ncclComm_t comm) {
  const auto ranks = static_cast<std::size_t>(self.ranks), me = static_cast<std::size_t>(self.rank);
  const std::size_t count = 1001;
  std::vector<std::int32_t> all(count * ranks, -1), one(count);
  for (std::size_t i = 0; i < count; ++i) one[i] = static_cast<std::int32_t>(me * count + i);
  const auto checkAll = [&](const char* what) {
    for (std::size_t i = 0; i < all.size(); ++i) require(all[i] == static_cast<std::int32_t>(i), what);
  };
  OK(ncclAllGather(one.data(), all.data(), count, ncclInt32, comm, nullptr));
  checkAll("all-gather");
  std::fill(all.begin(), all.end(), -1);
  std::copy(one.begin(), one.end(), all.begin() + static_cast<std::ptrdiff_t>(me * count));
  OK(ncclAllGather(all.data() + me * count, all.data(), count, ncclInt32, comm, nullptr));
  checkAll("all-gather in place");
  for (int root = 0; root < self.ranks; ++root) {
    std::vector<std::int32_t> got(count, -1);
    OK(ncclBroadcast(self.rank == root ? one.data() : nullptr, got.data(), count, ncclInt32, root, comm, nullptr));
    std::vector<std::int32_t> again = self.rank == root ? one : std::vector<std::int32_t>(count, -1);
    OK(ncclBcast(again.data(), count, ncclInt32, root, comm, nullptr));
    for (std::size_t i = 0; i < count; ++i) {
      require(got[i] == static_cast<std::int32_t>(static_cast<std::size_t>(root) * count + i), "broadcast");
      require(again[i] == got[i], "old broadcast");
    }
  }
}

// A byte that rank `from` sends rank `to`.
std::uint8_t sent(int from, int to, std::size_t i) { return byteOf(static_cast<std::uint64_t>(from * 1000 + to), i); }

// Buffers at an odd address, in place or not; `k` operations in one group.
void oneShape(const Rank& self, ncclComm_t comm, std::size_t bytes, std::size_t shift, std::uint8_t* a,
              std::uint8_t* b) {
  const int n = self.ranks;
  const auto all = bytes * static_cast<std::size_t>(n);
  const auto fill = [&] {
    for (int peer = 0; peer < n; ++peer) {
      for (std::size_t i = 0; i < bytes; ++i)
        a[shift + static_cast<std::size_t>(peer) * bytes + i] = sent(self.rank, peer, i);
    }
    std::memset(b, 0x11, all + shift + 8);
  };
  const auto checkFrom = [&](const std::uint8_t* at, int from, int to, const char* what) {
    for (std::size_t i = 0; i < bytes; ++i) require(at[i] == sent(from, to, i), what);
  };
  const auto part = [&](std::uint8_t* base, int peer) { return base + shift + static_cast<std::size_t>(peer) * bytes; };
  fill();
  OK(extra<AllToAll>("ncclAllToAll")(a + shift, b + shift, bytes, ncclInt8, comm, nullptr));
  for (int peer = 0; peer < n; ++peer) checkFrom(part(b, peer), peer, self.rank, "all-to-all");
  require(b[shift + all] == 0x11, "all-to-all wrote too far");

  fill();
  OK(extra<AlltoAll>("ncclAlltoAll")(a + shift, b + shift, bytes, ncclInt8, comm, nullptr));
  for (int peer = 0; peer < n; ++peer) checkFrom(part(b, peer), peer, self.rank, "NCCL's all-to-all");

  // Unequal: the peer's rank decides how much of its part travels.
  fill();
  std::vector<std::size_t> sends, receives, displacements;
  const auto share = [&](int from, int to) { return bytes * static_cast<std::size_t>((from + to) % 3) / 2; };
  for (int peer = 0; peer < n; ++peer) {
    sends.push_back(std::min(bytes, share(self.rank, peer)));
    receives.push_back(std::min(bytes, share(peer, self.rank)));
    displacements.push_back(static_cast<std::size_t>(peer) * bytes);
  }
  OK(extra<AllToAllv>("ncclAllToAllv")(a + shift, sends.data(), displacements.data(), b + shift, receives.data(),
                                       displacements.data(), ncclUint8, comm, nullptr));
  for (int peer = 0; peer < n; ++peer) {
    for (std::size_t i = 0; i < bytes; ++i) {
      const bool moved = i < receives[static_cast<std::size_t>(peer)];
      require(part(b, peer)[i] == (moved ? sent(peer, self.rank, i) : 0x11), "unequal all-to-all");
    }
  }

  // Ring, several in one group.
  fill();
  const int next = (self.rank + 1) % n, previous = (self.rank + n - 1) % n;
  OK(ncclGroupStart());
  for (int k = 0; k < 3; ++k) {
    OK(ncclSend(part(a, next), bytes, ncclInt8, next, comm, nullptr));
    OK(ncclRecv(part(b, k % n), bytes, ncclInt8, previous, comm, nullptr));
  }
  OK(ncclGroupEnd());
  for (int k = 0; k < std::min(3, n); ++k) checkFrom(part(b, k), previous, self.rank, "ring");

  for (int root = 0; root < n; ++root) {
    fill();
    OK(extra<Rooted>("ncclGather")(part(a, root), b + shift, bytes, ncclInt8, root, comm, nullptr));
    if (self.rank == root) {
      for (int peer = 0; peer < n; ++peer) checkFrom(part(b, peer), peer, root, "gather");
    }
    OK(extra<Rooted>("ncclScatter")(a + shift, b + shift, bytes, ncclInt8, root, comm, nullptr));
    checkFrom(b + shift, root, self.rank, "scatter");
    // In place: the root's own part lies where it belongs.
    OK(extra<Rooted>("ncclScatter")(a + shift, self.rank == root ? part(a, root) : b + shift, bytes, ncclInt8, root,
                                    comm, nullptr));
    checkFrom(self.rank == root ? part(a, root) : b + shift, root, self.rank, "scatter in place");
  }
  // What nccl-tests runs unchecked: source and destination the same. It has to end.
  OK(extra<AlltoAll>("ncclAlltoAll")(a + shift, a + shift, bytes, ncclInt8, comm, nullptr));
}

}  // namespace

void collectives(const Rank& self) {
  const ncclComm_t comm = self.connect();
  reductions<std::int8_t>(self, comm, ncclInt8);
  reductions<std::uint8_t>(self, comm, ncclUint8);
  reductions<std::int32_t>(self, comm, ncclInt32);
  reductions<std::uint32_t>(self, comm, ncclUint32);
  reductions<std::int64_t>(self, comm, ncclInt64);
  reductions<std::uint64_t>(self, comm, ncclUint64);
  reductions<float>(self, comm, ncclFloat32);
  reductions<double>(self, comm, ncclFloat64);
  smallFloats(self, comm);
  movers(self, comm);
  OK(ncclCommFinalize(comm));
  OK(ncclCommDestroy(comm));
}

void operations(const Rank& self) {
  const ncclComm_t comm = self.connect();
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{1}, std::size_t{77}, std::size_t{4096}, std::size_t{70001}}) {
    const std::size_t room = bytes * static_cast<std::size_t>(self.ranks) + 64;
    std::vector<std::uint8_t> a(room), b(room);
    for (const std::size_t shift : {std::size_t{0}, std::size_t{1}, std::size_t{13}})
      oneShape(self, comm, bytes, shift, a.data(), b.data());
    void *registeredA = nullptr, *registeredB = nullptr;
    OK(extra<CommRegister>("ncclCommRegister")(comm, a.data(), room, &registeredA));
    OK(extra<CommRegister>("ncclCommRegister")(comm, b.data(), room, &registeredB));
    oneShape(self, comm, bytes, 4, a.data(), b.data());
    OK(extra<CommDeregister>("ncclCommDeregister")(comm, registeredA));
    OK(extra<CommDeregister>("ncclCommDeregister")(comm, registeredB));
    void *own = nullptr, *other = nullptr;
    OK(extra<MemAlloc>("ncclMemAlloc")(&own, room));
    OK(extra<MemAlloc>("ncclMemAlloc")(&other, room));
    oneShape(self, comm, bytes, 0, static_cast<std::uint8_t*>(own), static_cast<std::uint8_t*>(other));
    OK(extra<MemFree>("ncclMemFree")(own));
    OK(extra<MemFree>("ncclMemFree")(other));
  }
  OK(ncclCommDestroy(comm));
}

// As nccl-tests with -g: one thread, a communicator for each rank, all calls in groups.
void oneThreadForAll(int ranks) {
  std::vector<ncclComm_t> comms(static_cast<std::size_t>(ranks)), grouped(comms.size()), halves(comms.size());
  OK(ncclCommInitAll(comms.data(), ranks, nullptr));
  ncclUniqueId id;
  OK(ncclGetUniqueId(&id));
  OK(ncclGroupStart());
  for (std::size_t r = 0; r < comms.size(); ++r) OK(ncclCommInitRank(&grouped[r], ranks, id, static_cast<int>(r)));
  OK(ncclGroupEnd());
  OK(ncclGroupStart());
  for (std::size_t r = 0; r < comms.size(); ++r)
    OK(ncclCommSplit(grouped[r], static_cast<int>(r) % 2, 0, &halves[r], nullptr));
  OK(ncclGroupEnd());
  const std::size_t count = 500;
  std::vector<std::vector<float>> in(comms.size(), std::vector<float>(count * comms.size())), out = in, sum = in;
  for (int round = 0; round < 20; ++round) {
    for (std::size_t r = 0; r < comms.size(); ++r) {
      for (std::size_t i = 0; i < in[r].size(); ++i)
        in[r][i] = static_cast<float>(r * 1000 + i + static_cast<std::size_t>(round));
    }
    OK(ncclGroupStart());
    for (std::size_t r = 0; r < comms.size(); ++r) {
      OK(extra<AllToAll>("ncclAllToAll")(in[r].data(), out[r].data(), count, ncclFloat32, comms[r], nullptr));
      if (hasCollectives())
        OK(ncclAllReduce(in[r].data(), sum[r].data(), in[r].size(), ncclFloat32, ncclSum, grouped[r], nullptr));
    }
    OK(ncclGroupEnd());
    for (std::size_t r = 0; r < comms.size(); ++r) {
      for (std::size_t i = 0; i < in[r].size(); ++i) {
        const std::size_t from = i / count;
        require(out[r][i] == in[from][r * count + i % count], "all-to-all by one thread");
        if (!hasCollectives()) continue;
        float want = 0;
        for (const auto& other : in) want += other[i];
        require(sum[r][i] == want, "all-reduce by one thread");
      }
    }
  }
  for (std::size_t r = 0; r < comms.size(); ++r) {
    int size = 0;
    OK(ncclCommCount(halves[r], &size));
    require(size == (ranks + (r % 2 == 0 ? 1 : 0)) / 2, "ranks of a half");
    for (const ncclComm_t comm : {comms[r], grouped[r], halves[r]}) {
      OK(ncclCommFinalize(comm));
      OK(ncclCommDestroy(comm));
    }
  }
}

}  // namespace fusco::test
