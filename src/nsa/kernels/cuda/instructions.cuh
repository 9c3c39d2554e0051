// What the machine has and C++ has no words for. No header of the CUDA toolkit: NVRTC compiles this where there is none.
#pragma once

using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;

struct alignas(64) TensorMap {  // the driver's CUtensorMap, opaque
  unsigned char bytes[128];
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers in shared memory, and what arrives at them.
__device__ __forceinline__ void barrier_init(u32 b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barriers_visible() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 b, int count) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0], %1;}" ::"r"(b), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_expect(u32 b, int bytes) {
  asm volatile("{.reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1;}" ::"r"(b), "r"(bytes) : "memory");
}
// Whether the phase of this parity is over; sleeps a while for it.
__device__ __forceinline__ bool barrier_try(u32 b, u32 parity) {
  u32 over;
  asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
               : "=r"(over) : "r"(b), "r"(parity) : "memory");
  return over;
}
// For a whole warp, whose lanes go on together: the compiler takes that for granted, and makes nothing of a __syncwarp() behind it.
__device__ __forceinline__ void barrier_wait(u32 b, u32 parity) {
  while (__any_sync(~0u, !barrier_try(b, parity))) {
  }
}

// Shared memory.
__device__ __forceinline__ u32 load_volatile(u32 a) {
  u32 v;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(v) : "r"(a) : "memory");
  return v;
}
__device__ __forceinline__ void store_volatile(u32 a, u32 v) {
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"(a), "r"(v) : "memory");
}
__device__ __forceinline__ void store_zeros(u32 a) {  // 16 bytes
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(a), "r"(0) : "memory");
}
__device__ __forceinline__ void load_words(u32 (&r)[4], u32 a) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void store_words(u32 a, const u32 (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void writes_before_loads() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Loads into shared memory.
__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 full, int column, int head, int row, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(to), "l"(map), "r"(full), "r"(column), "r"(head), "r"(row), "r"(batch) : "memory");
}
// The same, of what is read by this CTA alone: the first to leave L2.
__device__ __forceinline__ void load_box_once(u32 to, const TensorMap* map, u32 full, int column, int head, int row, int batch) {
  asm volatile("{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
               "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], policy;}"
               ::"r"(to), "l"(map), "r"(full), "r"(column), "r"(head), "r"(row), "r"(batch) : "memory");
}
__device__ __forceinline__ void copy_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Global memory that is read or written once: it should not drive out of L2 what is read again.
__device__ __forceinline__ uint4 load_once(const uint4* a) {
  uint4 x;
  asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(a) : "memory");
  return x;
}
__device__ __forceinline__ void store_once(uint4* a, uint4 x) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(a), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Four 8 x 8 matrices, whose rows of 16 bytes the lanes give: as they lie, and turned.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void load_turned(u32 (&r)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The 16-bit type: bf16, or with FP16 defined fp16.
#ifdef FP16
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {  // 16 x 16 by 16 x 8
  asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ u32 pack_here(float low, float high) {  // and not later: half the registers from here on
  u32 r;
  asm volatile("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float widen(u16 x) {
  float y;
#ifdef FP16
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
#else
  y = __uint_as_float((u32)x << 16);
#endif
  return y;
}

// Until every launch before this one has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Once all CTAs have come here or ended: the next launch, if it was told so, may fill what is free of the GPU.
__device__ __forceinline__ void dependents_may_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

template <int N>
__device__ __forceinline__ void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
