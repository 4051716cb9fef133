// Point-to-point and all-to-all calls.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "api/group.h"
#include "api/state.h"

using namespace fusco;
using namespace fusco::api;

namespace {

std::size_t product(const char* what, std::size_t a, std::size_t b) {
  std::size_t result = 0;
  if (__builtin_mul_overflow(a, b, &result) || result > (std::size_t{1} << 62)) {
    fail(Code::invalidArgument, fmt::format("{}: {} x {} bytes overflow", what, a, b));
  }
  return result;
}

void checkPeer(const CommState& comm, int peer) {
  if (peer < 0 || peer >= comm.ranks)
    fail(Code::invalidArgument, fmt::format("peer is {}, must be 0 to {}", peer, comm.ranks - 1));
}

// A row that is received twice would hold one or the other. Lists in GPU memory are empty here.
void checkDistinct(const std::vector<std::int64_t>& list) {
  // As most lists are.
  const auto notRising = [](std::int64_t a, std::int64_t b) { return a >= b; };
  if (std::adjacent_find(list.begin(), list.end(), notRising) == list.end()) return;
  const auto refuse = [&](std::int64_t row) {
    fail(Code::invalidArgument, fmt::format("row {} is named twice; each row can be received once", row));
  };
  const auto most = static_cast<std::size_t>(*std::max_element(list.begin(), list.end()));
  if (most / 64 <= list.size()) {
    std::vector<std::uint64_t> seen(most / 64 + 1, 0);
    for (const std::int64_t row : list) {
      std::uint64_t& word = seen[static_cast<std::size_t>(row) / 64];
      const std::uint64_t bit = std::uint64_t{1} << (row % 64);
      if ((word & bit) != 0) refuse(row);
      word |= bit;
    }
    return;
  }
  std::vector<std::int64_t> sorted = list;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse(*twice);
}

void transfer(bool send, const void* buffer, std::size_t rows, std::size_t rowBytes, const void* indices,
              fuscoDataType_t indexType, int peer, fuscoComm_t handle, cudaStream_t stream) {
  const auto comm = findComm(handle);
  checkPeer(*comm, peer);
  engine::TransferRequest request;
  request.send = send;
  request.peer = peer;
  request.base = static_cast<std::byte*>(const_cast<void*>(buffer));
  request.rows = rows;
  request.rowBytes = rowBytes;
  request.stream = stream;
  const std::size_t bytes = product("rows", rows, rowBytes);
  if (buffer == nullptr && bytes > 0)
    fail(Code::invalidArgument, fmt::format("the buffer is NULL and {} bytes are to be moved", bytes));
  if (indices != nullptr && bytes > 0) {
    if (indexType != fuscoInt32 && indexType != fuscoInt64) {
      fail(Code::invalidArgument,
           fmt::format("row indices are fuscoInt32 or fuscoInt64, not {}", static_cast<int>(indexType)));
    }
    request.listed = true;
    request.deviceList = indices;
    request.narrow = indexType == fuscoInt32;
  }
  if (request.listed && comm->gpu < 0) {
    request.list.resize(rows);
    for (std::size_t i = 0; i < rows; ++i) {
      request.list[i] = indexType == fuscoInt32 ? static_cast<const std::int32_t*>(indices)[i]
                                                : static_cast<const std::int64_t*>(indices)[i];
      if (request.list[i] < 0)
        fail(Code::invalidArgument, fmt::format("row index {} is {}, must not be negative", i, request.list[i]));
      product("row index", static_cast<std::size_t>(request.list[i]) + 1, rowBytes);
    }
  }
  if (!send && request.listed) checkDistinct(request.list);
  asGroup([&] { enqueue(comm, std::move(request)); });
}

}  // namespace

fuscoResult_t fuscoSend(const void* sendbuff, size_t count, fuscoDataType_t datatype, int peer, fuscoComm_t comm,
                        cudaStream_t stream) {
  return guarded("fuscoSend", [&] {
    const std::size_t bytes = product("count", count, typeBytes(datatype));
    transfer(true, sendbuff, 1, bytes, nullptr, fuscoInt64, peer, comm, stream);
  });
}

fuscoResult_t fuscoRecv(void* recvbuff, size_t count, fuscoDataType_t datatype, int peer, fuscoComm_t comm,
                        cudaStream_t stream) {
  return guarded("fuscoRecv", [&] {
    const std::size_t bytes = product("count", count, typeBytes(datatype));
    transfer(false, recvbuff, 1, bytes, nullptr, fuscoInt64, peer, comm, stream);
  });
}

fuscoResult_t fuscoGatherSend(const void* sendbuff, size_t rows, size_t rowBytes, const void* rowIndices,
                              fuscoDataType_t indexType, int peer, fuscoComm_t comm, cudaStream_t stream) {
  return guarded("fuscoGatherSend",
                 [&] { transfer(true, sendbuff, rows, rowBytes, rowIndices, indexType, peer, comm, stream); });
}

fuscoResult_t fuscoScatterRecv(void* recvbuff, size_t rows, size_t rowBytes, const void* rowIndices,
                               fuscoDataType_t indexType, int peer, fuscoComm_t comm, cudaStream_t stream) {
  return guarded("fuscoScatterRecv",
                 [&] { transfer(false, recvbuff, rows, rowBytes, rowIndices, indexType, peer, comm, stream); });
}

fuscoResult_t fuscoAllToAllv(const void* sendbuff, const size_t sendcounts[], const size_t sdispls[], void* recvbuff,
                             const size_t recvcounts[], const size_t rdispls[], fuscoDataType_t datatype,
                             fuscoComm_t handle, cudaStream_t stream) {
  return guarded("fuscoAllToAllv", [&] {
    const auto comm = findComm(handle);
    if (sendcounts == nullptr || sdispls == nullptr || recvcounts == nullptr || rdispls == nullptr) {
      fail(Code::invalidArgument, "a count or displacement array is NULL");
    }
    const std::size_t size = typeBytes(datatype);
    std::vector<engine::TransferRequest> requests;
    std::uintptr_t low[2] = {UINTPTR_MAX, UINTPTR_MAX}, high[2] = {0, 0};
    for (int peer = 0; peer < comm->ranks; ++peer) {
      for (const bool send : {true, false}) {
        const std::size_t bytes = product("count", send ? sendcounts[peer] : recvcounts[peer], size);
        const std::size_t offset = product("displacement", send ? sdispls[peer] : rdispls[peer], size);
        auto* base = static_cast<std::byte*>(send ? const_cast<void*>(sendbuff) : recvbuff);
        if (base == nullptr && bytes > 0)
          fail(Code::invalidArgument, fmt::format("{} is NULL", send ? "sendbuff" : "recvbuff"));
        engine::TransferRequest request;
        request.send = send;
        request.peer = peer;
        request.base = bytes == 0 ? nullptr : base + offset;
        request.rows = 1;
        request.rowBytes = bytes;
        request.stream = stream;
        if (bytes > 0) {
          const auto at = reinterpret_cast<std::uintptr_t>(request.base);
          low[send] = std::min(low[send], at);
          high[send] = std::max(high[send], at + bytes);
        }
        requests.push_back(std::move(request));
      }
    }
    if (low[0] < high[1] && low[1] < high[0]) fail(Code::invalidArgument, "sendbuff and recvbuff overlap");
    asGroup([&] {
      for (engine::TransferRequest& request : requests) enqueue(comm, std::move(request));
    });
  });
}
