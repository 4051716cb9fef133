#include <cuda_bf16.h>

#include "bench/gpu/limit.h"

namespace fusco::bench {

namespace {

__device__ unsigned shared32(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

constexpr unsigned kNoPlace = 0xffffffffu;

// Rows that are no multiple of 16 bytes: a warp a row, in the widest vectors that divide it.
template <typename Vector>
__global__ void __launch_bounds__(256) anyRow(Replicate w) {
  const int lane = threadIdx.x % 32;
  const int vectors = static_cast<int>(w.rowBytes / sizeof(Vector));
  for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < w.rows; row += gridDim.x * blockDim.x / 32) {
    const auto* from = reinterpret_cast<const Vector*>(w.source + row * w.rowBytes);
    for (int v = lane; v < vectors; v += 128) {
      Vector x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (v + 32 * i < vectors) x[i] = __ldcs(from + v + 32 * i);
      for (int k = 0; k < w.copies; ++k) {
        const unsigned place = w.places[row * w.copies + k];
        if (place == kNoPlace) continue;
        auto* to = reinterpret_cast<Vector*>(w.destination + place * w.rowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (v + 32 * i < vectors) __stcs(to + v + 32 * i, x[i]);
      }
    }
  }
}

__global__ void __launch_bounds__(256) warpARow(Replicate w) {
  const int lane = threadIdx.x % 32;
  const int vectors = static_cast<int>(w.rowBytes / 16);
  for (int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32; row < w.rows; row += gridDim.x * blockDim.x / 32) {
    const auto* from = reinterpret_cast<const uint4*>(w.source + row * w.rowBytes);
    for (int v = lane; v < vectors; v += 128) {
      uint4 x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (v + 32 * i < vectors) x[i] = __ldcs(from + v + 32 * i);
      for (int k = 0; k < w.copies; ++k) {
        const unsigned place = w.places[row * w.copies + k];
        if (place == kNoPlace) continue;
        auto* to = reinterpret_cast<uint4*>(w.destination + place * w.rowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (v + 32 * i < vectors) __stcs(to + v + 32 * i, x[i]);
      }
    }
  }
}

// One warp a block; a row (or a part of kParts of it) is loaded into one of kBuffers and stored `copies` times, a lane
// a copy. kPolicy: 0 none, 1 loads evict first, 2 loads and stores evict first.
template <int kBuffers, int kParts, int kPolicy>
__global__ void __launch_bounds__(32) bulk(Replicate w) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char buffers[];
  __shared__ std::uint64_t full[kBuffers];
  const int lane = threadIdx.x;
  const unsigned part = static_cast<unsigned>(w.rowBytes / kParts);
  if (lane == 0) {
    for (int b = 0; b < kBuffers; ++b) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared32(&full[b])));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  unsigned long long first;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(first));
  const unsigned total = static_cast<unsigned>(w.rows) * kParts;
  const unsigned count = blockIdx.x < total ? (total - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
  const auto load = [&](unsigned n) {
    if (w.source == nullptr || lane != 0) return;
    const unsigned unit = blockIdx.x + n * gridDim.x;
    const unsigned char* from = reinterpret_cast<const unsigned char*>(w.source) + std::size_t{unit} * part;
    const unsigned barrier = shared32(&full[n % kBuffers]);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(part) : "memory");
    if constexpr (kPolicy == 0) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared32(buffers + (n % kBuffers) * part)),
                   "l"(from), "r"(part), "r"(barrier)
                   : "memory");
    } else {
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
          "%4;" ::"r"(shared32(buffers + (n % kBuffers) * part)),
          "l"(from), "r"(part), "r"(barrier), "l"(first)
          : "memory");
    }
  };
  for (unsigned n = 0; n + 1 < kBuffers && n < count; ++n) load(n);
  for (unsigned n = 0; n < count; ++n) {
    const unsigned unit = blockIdx.x + n * gridDim.x;
    const unsigned row = unit / kParts;
    unsigned place = kNoPlace;
    if (lane < w.copies) place = w.places[row * w.copies + lane];
    if (w.source != nullptr) {
      const unsigned barrier = shared32(&full[n % kBuffers]);
      unsigned done = 0;
      while (done == 0) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
            : "=r"(done)
            : "r"(barrier), "r"(n / kBuffers & 1)
            : "memory");
      }
    }
    if (place != kNoPlace) {
      std::byte* to = w.destination + place * w.rowBytes + unit % kParts * part;
      const unsigned from = shared32(buffers + (n % kBuffers) * part);
      if constexpr (kPolicy == 2) {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
                     "r"(from), "r"(part), "l"(first)
                     : "memory");
      } else {
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(part)
                     : "memory");
      }
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (n + kBuffers - 1 < count) {
      asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
      __syncwarp();
      load(n + kBuffers - 1);
    }
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

template <int kBuffers, int kParts, int kPolicy>
cudaError_t launchBulk(const Replicate& w, cudaStream_t stream) {
  const std::size_t shared = w.rowBytes / kParts * kBuffers;
  const cudaError_t error = cudaFuncSetAttribute(bulk<kBuffers, kParts, kPolicy>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  bulk<kBuffers, kParts, kPolicy><<<w.blocks, 32, shared, stream>>>(w);
  return cudaGetLastError();
}

struct Way {
  const char* name;
  cudaError_t (*launch)(const Replicate&, cudaStream_t);
  int buffers, parts;  // of the bulk ways
};
cudaError_t launchWarps(const Replicate& w, cudaStream_t stream) {
  if (w.rowBytes % 16 == 0)
    warpARow<<<w.blocks, 256, 0, stream>>>(w);
  else if (w.rowBytes % 8 == 0)
    anyRow<uint2><<<w.blocks, 256, 0, stream>>>(w);
  else if (w.rowBytes % 4 == 0)
    anyRow<unsigned><<<w.blocks, 256, 0, stream>>>(w);
  else if (w.rowBytes % 2 == 0)
    anyRow<unsigned short><<<w.blocks, 256, 0, stream>>>(w);
  else
    anyRow<unsigned char><<<w.blocks, 256, 0, stream>>>(w);
  return cudaGetLastError();
}
const Way kWays[] = {
    {"warp a row", launchWarps, 0, 1},
    {"bulk 4 buffers", launchBulk<4, 1, 0>, 4, 1},
    {"bulk 4 buffers, loads evict first", launchBulk<4, 1, 1>, 4, 1},
    {"bulk 4 buffers, all evict first", launchBulk<4, 1, 2>, 4, 1},
    {"bulk 8 buffers", launchBulk<8, 1, 1>, 8, 1},
    {"bulk 12 buffers", launchBulk<12, 1, 1>, 12, 1},
    {"bulk halves, 8 buffers", launchBulk<8, 2, 1>, 8, 2},
    {"bulk quarters, 8 buffers", launchBulk<8, 4, 1>, 8, 4},
    {"bulk sevenths, 8 buffers", launchBulk<8, 7, 1>, 8, 7},
    {"bulk 3 buffers", launchBulk<3, 1, 1>, 3, 1},
    {"bulk 2 buffers", launchBulk<2, 1, 1>, 2, 1},
};

__global__ void __launch_bounds__(256, 3) sums(Replicate w) {
  const int lane = threadIdx.x % 32;
  const int vectors = static_cast<int>(w.rowBytes / 16);
  for (int row = (threadIdx.x / 32) * gridDim.x + blockIdx.x; row < w.rows; row += gridDim.x * blockDim.x / 32) {
    for (int v = lane; v < vectors; v += 32) {
      float acc[8] = {};
      uint4 x[8];
      for (int k0 = 0; k0 < w.copies; k0 += 8) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k0 + k < w.copies)
            x[k] = __ldcs(
                reinterpret_cast<const uint4*>(w.destination + w.places[row * w.copies + k0 + k] * w.rowBytes) + v);
        }
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          if (k0 + k >= w.copies) break;
          const auto* numbers = reinterpret_cast<const __nv_bfloat162*>(&x[k]);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 two = __bfloat1622float2(numbers[i]);
            acc[2 * i] += two.x;
            acc[2 * i + 1] += two.y;
          }
        }
      }
      uint4 out;
      auto* numbers = reinterpret_cast<__nv_bfloat162*>(&out);
#pragma unroll
      for (int i = 0; i < 4; ++i) numbers[i] = __floats2bfloat162_rn(acc[2 * i], acc[2 * i + 1]);
      __stcs(reinterpret_cast<uint4*>(const_cast<std::byte*>(w.source) + row * w.rowBytes) + v, out);
    }
  }
}

}  // namespace

int replicateWays() { return static_cast<int>(sizeof kWays / sizeof *kWays); }
const char* replicateName(int way) { return kWays[way].name; }
bool replicateCan(const Replicate& what, int way) {
  if (kWays[way].buffers == 0) return true;
  int device = 0, major = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const auto buffers = static_cast<std::size_t>(kWays[way].buffers), parts = static_cast<std::size_t>(kWays[way].parts);
  // A row's buffer begins where the bulk copies want it; the barriers need a little too.
  return major >= 9 && what.copies <= 32 && what.rowBytes % (16 * parts) == 0 &&
         what.rowBytes / parts * buffers + 1024 <= static_cast<std::size_t>(shared);
}
cudaError_t replicate(const Replicate& what, int way, cudaStream_t stream) { return kWays[way].launch(what, stream); }

cudaError_t gatherSum(const Replicate& what, cudaStream_t stream) {
  sums<<<what.blocks, 256, 0, stream>>>(what);
  return cudaGetLastError();
}

}  // namespace fusco::bench
