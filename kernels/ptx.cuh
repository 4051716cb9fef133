// What CUDA C++ has no words for: bulk copies between global and shared memory and their barriers (sm_90 and later),
// memory operations with an order, and dependent launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fusco::kernels::ptx {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr bool kHasBulk = true;
#else
inline constexpr bool kHasBulk = false;
#endif

__device__ inline std::uint32_t sharedAddress(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// A launch that depends on the one before it may begin early: what comes before this call overlaps with that one's end.
__device__ inline void waitForPreviousLaunch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next launch begin early.
__device__ inline void letNextLaunchBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Words that other GPUs write or read.
__device__ inline std::uint32_t loadAcquire(const std::uint32_t* word) {
  std::uint32_t value = 0;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
#endif
  return value;
}
__device__ inline void storeRelease(std::uint32_t* word, std::uint32_t value) {
#if __CUDA_ARCH__ >= 700
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
#endif
}
// In the order that a fence before it gives.
__device__ inline void storeRelaxed(std::uint32_t* word, std::uint32_t value) {
#if __CUDA_ARCH__ >= 700
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
#endif
}
// Words in shared memory, between warps of a block.
__device__ inline std::uint32_t loadAcquireShared(const std::uint32_t* word) {
  std::uint32_t value = 0;
#if __CUDA_ARCH__ >= 700
  asm volatile("ld.acquire.cta.shared.u32 %0, [%1];" : "=r"(value) : "r"(sharedAddress(word)) : "memory");
#endif
  return value;
}
__device__ inline void storeReleaseShared(std::uint32_t* word, std::uint32_t value) {
#if __CUDA_ARCH__ >= 700
  asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(sharedAddress(word)), "r"(value) : "memory");
#endif
}
__device__ inline std::uint32_t loadVolatile(const std::uint32_t* word) {
  return *const_cast<const volatile std::uint32_t*>(word);
}
__device__ inline std::uint64_t nanoseconds() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

#if __CUDA_ARCH__ >= 900
// What ordinary accesses have seen, the copy engine sees.
__device__ inline void fenceProxyAsync() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ inline void barrierInit(std::uint64_t* barrier, std::uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(sharedAddress(barrier)), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine.
__device__ inline void barrierInitFence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Barriers and buffers in shared memory by their addresses there.
__device__ inline void barrierExpect(std::uint32_t barrier, std::uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrierExpect(std::uint64_t* barrier, std::uint32_t bytes) {
  barrierExpect(sharedAddress(barrier), bytes);
}
__device__ inline void barrierWait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ inline void barrierWait(std::uint64_t* barrier, std::uint32_t parity) {
  barrierWait(sharedAddress(barrier), parity);
}

// 16-byte aligned, a multiple of 16 bytes. What is loaded will not be read again.
__device__ inline void bulkLoad(std::uint32_t shared, const void* global, std::uint32_t bytes, std::uint32_t barrier,
                                std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ inline void bulkLoad(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier,
                                std::uint64_t policy) {
  bulkLoad(sharedAddress(shared), global, bytes, sharedAddress(barrier), policy);
}
__device__ inline uint4 loadShared(std::uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
__device__ inline void bulkStore(void* global, const void* shared, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(sharedAddress(shared)),
               "r"(bytes)
               : "memory");
}
__device__ inline void bulkCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups still have to read shared memory.
template <int kPending>
__device__ inline void bulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
__device__ inline void bulkWait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
__device__ inline std::uint64_t evictFirst() {
  std::uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
#endif

}  // namespace fusco::kernels::ptx
