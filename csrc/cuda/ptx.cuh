// The instructions that C++ has no name for, one function each, and nothing else.
//
// The kernels reach the GPU only through this file. A host build defines BITKERNELS_EMULATED and
// gets functions of the same names that do what the PTX manual says (bitkernels_tests/emulator).
#pragma once

#ifdef BITKERNELS_EMULATED
#include "ptx_emulated.h"
#else

#include "types.cuh"

extern __shared__ __align__(1024) unsigned char dynamic_shared[];

DEVICE unsigned char* shared_memory() { return dynamic_shared; }

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// The mask tells the compiler that it is not negative: divisions are shifts then.
DEVICE int thread_index() { return threadIdx.x & 1023; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void sync_threads() { __syncthreads(); }
// Whether any thread of the block says so.
DEVICE bool sync_threads_any(bool x) { return __syncthreads_or(x); }

// Waits for `count` threads of the block at barrier `id` (1 to 15; 0 is sync_threads).
DEVICE void sync_some(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// The same, and to arrive there and wait for nobody, where `real`, which all lanes of a warp agree
// on. Around a branch compilers keep in registers what they would compute again.
DEVICE void sync_if(bool real, int id, int count) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %0, 0; @p bar.sync %1, %2; }" ::"r"(static_cast<int>(real)),
      "r"(id), "r"(count)
      : "memory");
}

DEVICE void arrive_if(bool real, int id, int count) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %0, 0; @p bar.arrive %1, %2; }" ::"r"(static_cast<int>(real)),
      "r"(id), "r"(count)
      : "memory");
}

// x, of which the compiler no longer knows where it came from: what depends on it is computed again
// in each turn of a loop, not kept in registers across.
DEVICE int forget(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// The same in all lanes, and known to be by the compiler: a branch on it leaves the warp whole.
DEVICE bool any_lane(bool x) { return __any_sync(0xFFFFFFFFu, x); }

DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
DEVICE u32 shuffle(u32 value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xFFFFFFFFu, x); }
DEVICE int popcount(u32 value) { return __popc(value); }

// word << 1, with the sign bit of `value` below.
DEVICE u32 funnel(u32 word, u32 value) { return __funnelshift_l(value, word, 1); }
// Bytes of a (0 to 3) and b (4 to 7), as the digits of `order` say.
DEVICE u32 permute(u32 a, u32 b, u32 order) { return __byte_perm(a, b, order); }

// The sign bits of the halves of a and b, each eight times: 4 bytes.
DEVICE u32 sign_bytes(u32 a, u32 b) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, 0xFDB9;" : "=r"(bytes) : "r"(a), "r"(b));
  return bytes;
}

// One rounding a step, whatever the compiler would like to contract.
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

DEVICE u32 half_bits(float x) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

DEVICE u32 bfloat_bits(float x) {
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
}

DEVICE float half_value(u32 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<u16>(bits)));
  return x;
}

DEVICE float float_value(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bfloat_value(u32 bits) { return __uint_as_float(bits << 16); }

template <class T>
DEVICE T load(const T* p) {
  return __ldg(p);
}

DEVICE void load2(float (&v)[2], const float* p) {
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "l"(p));
}

DEVICE void load2(u32 (&v)[2], const u32* p) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
}

DEVICE void load2(int (&v)[2], const int* p) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(p));
}

DEVICE void load2(u16 (&v)[2], const u16* p) {
  asm volatile("ld.global.nc.v2.b16 {%0, %1}, [%2];" : "=h"(v[0]), "=h"(v[1]) : "l"(p));
}

DEVICE void load4(u32 (&v)[4], const u32* p) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "l"(p));
}

template <class T>
DEVICE void store(T* p, T value) {
  *p = value;
}

DEVICE void store4(void* p, const u32 (&v)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}

DEVICE void store2(void* p, u32 a, u32 b) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(a), "r"(b) : "memory");
}

DEVICE void load_shared4(u32 (&v)[4], u32 address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

DEVICE void load_shared2(u32 (&v)[2], u32 address) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
               : "=r"(v[0]), "=r"(v[1])
               : "r"(address)
               : "memory");
}

DEVICE u32 load_shared(u32 address) {
  u32 value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

DEVICE void store_shared(u32 address, u32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

DEVICE void store_shared2(u32 address, u32 a, u32 b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

DEVICE void store_shared4(u32 address, const u32 (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}

// The low half of a register, and into one; in between nobody narrows sums to 16 bits, which takes
// more instructions.
DEVICE void store_shared_half(u32 address, u32 value) {
  asm volatile(
      "{ .reg .b16 low, high; mov.b32 {low, high}, %1; st.shared.b16 [%0], low; }" ::"r"(address),
      "r"(value)
      : "memory");
}

DEVICE u32 load_shared_half(u32 address) {
  u32 value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

// A fragment of 16 rows by 32 bytes for mma_and and wgmma_and, from rows in shared memory: lane l
// says where 16 bytes of row l % 16 are, the first of the 32 or, from lane 16 on, the last.
DEVICE void load_fragment(u32 (&v)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

DEVICE void add_global(u64* p, u64 value) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// Copies SIZE bytes, or writes as many zeros and reads nothing.
template <int SIZE>
DEVICE void copy_async(u32 to, const void* from, bool real) {
  const int bytes = real ? SIZE : 0;
  if (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from), "r"(bytes),
                 "n"(SIZE)
                 : "memory");
  }
}

template <int SIZE>
DEVICE void copy_async(u32 to, const void* from) {
  if (SIZE == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(SIZE)
                 : "memory");
  }
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most PENDING of this thread's groups are on their way.
template <int PENDING>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// d += popcount(a and b): 16 x 256 bits by 8 x 256 bits. Lane l holds, of a, rows l / 4 (registers
// 0, 2) and l / 4 + 8 (1, 3), bits 32 (l % 4) (0, 1) and 128 on (2, 3); of b, row l / 4 and the
// same bits; of d, rows l / 4 (0, 1) and l / 4 + 8 (2, 3), columns 2 (l % 4) and the next.
DEVICE void mma_and(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The rest is Hopper's: wgmma, mbarriers, bulk tensor copies.

// Lets what this thread wrote by ordinary stores and cp.async be read by wgmma and bulk copies. (A
// fragment of wgmma in registers needs none.)
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Of registers, before the first wgmma that uses them after anything else did.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "wgmma.cuh"

template <int N>
DEVICE void wgmma_and(int (&d)[N / 8][4], u64 a, u64 b, bool accumulate) {
  Wgmma<N>::run(d, a, b, accumulate);
}

template <int N>
DEVICE void wgmma_and(int (&d)[N / 8][4], const u32 (&a)[4], u64 b, bool accumulate) {
  Wgmma<N>::run(d, a, b, accumulate);
}
#endif

template <int REGISTERS>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#include "bulk_copy.cuh"

// Whether this is the one lane of a whole warp that acts for it.
DEVICE bool elected() {
  int chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.b32 %0, 1, 0, p; }"
               : "=r"(chosen)::"memory");
  return chosen;
}

// x, the same in all lanes, and now known to be by the compiler: loops over it keep the warp whole.
DEVICE int uniform(int x) { return __shfl_sync(0xFFFFFFFFu, x, 0); }
DEVICE void sync_warp() { __syncwarp(); }

// 1, which the compiler does not know: a product by it stays a product. It is the height of the
// grid.
DEVICE int unknown_one() {
  int one;
  asm("mov.u32 %0, %%nctaid.y;" : "=r"(one));
  return one;
}

// Two conversions in one instruction, a in the low half.
DEVICE u32 half_pair_bits(float a, float b) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

DEVICE u32 bfloat_pair_bits(float a, float b) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
}

// Stores where `real`, without a branch: around one, compilers double all that follows.
DEVICE void store_if(bool real, u32* p, u32 value) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b32 [%1], %2; }" ::"r"(
                   static_cast<int>(real)),
               "l"(p), "r"(value)
               : "memory");
}

DEVICE void store2_if(bool real, void* p, u32 a, u32 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v2.b32 [%1], {%2, %3}; }" ::"r"(
                   static_cast<int>(real)),
               "l"(p), "r"(a), "r"(b)
               : "memory");
}

DEVICE void store4_if(bool real, void* p, const u32 (&v)[4]) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.v4.b32 [%1], {%2, %3, %4, %5}; }" ::"r"(
          static_cast<int>(real)),
      "l"(p), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}

// Loads where `real`, else 0, without a branch.
DEVICE u32 load_if(bool real, const u32* p) {
  u32 value;
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %1, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%2]; }"
      : "=&r"(value)
      : "r"(static_cast<int>(real)), "l"(p));
  return value;
}

DEVICE void load2_if(bool real, u32 (&v)[2], const u32* p) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %2, 0; mov.b32 %0, 0; mov.b32 %1, 0; "
      "@p ld.global.nc.v2.b32 {%0, %1}, [%3]; }"
      : "=&r"(v[0]), "=&r"(v[1])
      : "r"(static_cast<int>(real)), "l"(p));
}

// Loads where `real`; else v is anything.
DEVICE void load4_if(bool real, u32 (&v)[4], const void* p) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, %4, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%5]; }"
      : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
      : "r"(static_cast<int>(real)), "l"(p));
}

// Of what a kernel before this one may have written while this one ran already.
DEVICE int load_fresh(const int* p) {
  int value;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

// A kernel that was launched to overlap with the one before it: returns when that one has ended and
// what it wrote can be read. The one before says from when on the other may start; all that it
// waited for itself is then there, for it was not launched so.
DEVICE void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void dependents_may_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif  // BITKERNELS_EMULATED
