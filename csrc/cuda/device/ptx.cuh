// One PTX instruction a function. CUDA headers alone.
#pragma once

#include <cstdint>

namespace sgl_comm::ptx {

// 16 bytes from memory that a peer may be writing. Each 32-bit word is read whole; the four need not be of one write.
__device__ __forceinline__ uint4 load_relaxed_sys(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// load_relaxed_sys() if `wanted`, else zeros; without a branch, so that several such loads are under way at once.
__device__ __forceinline__ uint4 load_relaxed_sys_if(const void* p, bool wanted) {
  uint4 v{};
  asm volatile(
      "{ .reg .pred wanted; setp.ne.u32 wanted, %5, 0;"
      " @wanted ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<uint32_t>(wanted))
      : "memory");
  return v;
}

// 16 bytes into a peer's memory. Each 32-bit word arrives whole; the four need not arrive at once.
__device__ __forceinline__ void store_relaxed_sys(void* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed_sys_u32(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys_u32(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ unsigned long long load_relaxed_sys_u64(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void store_relaxed_sys_u64(unsigned long long* p, unsigned long long v) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}

// Two neighbouring 64-bit words, asked for at once.
__device__ __forceinline__ ulonglong2 load_pair(const void* p) {
  ulonglong2 v;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(p) : "memory");
  return v;
}

// A flag of a peer's, and of one's own. What is written before the store is seen after a load that sees it.
__device__ __forceinline__ void store_release_sys(unsigned long long* p, unsigned long long v) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ unsigned long long load_acquire_sys(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

// 16 bytes of the caller's tensor. Volatile, so that it is asked for where it stands in the program: before the epoch.
__device__ __forceinline__ uint4 load_input(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// Programmatic dependent launch. Before wait_for_previous_kernel() nothing that the previous kernel of the stream
// wrote may be touched; after it, all of that kernel is done. launch_next_kernel() lets the next one start. `ready`,
// not null, is made before the wait: the compiler otherwise puts off to after it what could be done before.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous_kernel(uint64_t ready) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred made;\n"
      "setp.ne.u64 made, %0, 0;\n"
      "@made griddepcontrol.wait;\n"
      "}" ::"l"(ready)
      : "memory");
#endif
}
__device__ __forceinline__ void launch_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Clusters of blocks. How many there are, which of them is this block's, how many blocks it has, and which of those
// this is; and a barrier of all its threads, in two halves, which orders nothing but what init_barrier() has done.
__device__ __forceinline__ uint32_t num_clusters() {
  uint32_t count = gridDim.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
#endif
  return count;
}
__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
#endif
  return index;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// A barrier in shared memory that counts arrivals and bytes. A phase of it ends when `arrivals` threads have arrived
// and all bytes that they expected have come. Made before a cluster barrier, other blocks may use it after that.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared.b64 [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)),
      "r"(arrivals)
      : "memory");
#endif
}
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}
// Waits for the end of a phase: of the first, third, ... (parity 0) or of the others (parity 1). What bytes it counted
// are then here.
__device__ __forceinline__ void await_phase(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}
// A store into the shared memory of block `block` of the cluster, which its barrier counts. `p` and `barrier` are where
// they are in one's own.
__device__ __forceinline__ void store_async(float* p, uint64_t* barrier, uint32_t block, float value) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .b32 address, counted;\n"
      "mapa.shared::cluster.u32 address, %0, %2;\n"
      "mapa.shared::cluster.u32 counted, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [address], %3, [counted];\n"
      "}" ::"r"(shared_address(p)),
      "r"(shared_address(barrier)), "r"(block), "f"(value)
      : "memory");
#endif
}

// The value, in a register from here on: what comes from a kernel's parameters or from where a thread stands is
// otherwise made anew wherever it is used. Pointers are of global memory.
__device__ __forceinline__ uint32_t in_register(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
template <typename T>
__device__ __forceinline__ T* in_register(T* value) {
  asm volatile("" : "+l"(value));
  __builtin_assume(__isGlobal(value));
  return value;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

}  // namespace sgl_comm::ptx
