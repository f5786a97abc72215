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

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }
DEVICE void sync_threads() { __syncthreads(); }

// Waits for `count` threads of the block at barrier `id` (1 to 15; 0 is sync_threads).
DEVICE void sync_some(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

DEVICE u32 shuffle_xor(u32 value, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, value, mask); }
DEVICE int popcount(u32 value) { return __popc(value); }

// One rounding a step, whatever the compiler would like to contract.
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }

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

DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bfloat_value(u32 bits) { return __uint_as_float(bits << 16); }

template <class T>
DEVICE T load(const T* p) {
  return __ldg(p);
}

// Of memory that the same launch may write.
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

#endif  // BITKERNELS_EMULATED
