// wgmma m64nNk256 ... and.popc on sm_90a: one asynchronous product of a warpgroup.
//
// d[i][j] += popcount(a and b) for 64 rows of a by N rows of b, 256 bits of both. b is in shared
// memory, where its descriptor points; a too, or in registers. Warp w of the group holds rows 16 w
// to 16 w + 15 of d, as mma_and does: d[i] is the fragment of columns 8 i to 8 i + 7. In registers
// a is a fragment of mma_and of the same rows; they belong to the product until it is waited for.
#pragma once
#include "types.cuh"

template <int N>
struct Wgmma;

// The first 10, and the ten from 10 t on, of the numbers of the operands.
#define ONES_ "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define TEN_(t)                                                                            \
  ", %" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t \
  "8, %" #t "9"

// 1 and 8 fragments of d as operands.
#define FRAGMENT_(i) "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])
#define FRAGMENTS_(i)                                                                   \
  FRAGMENT_(i), FRAGMENT_(i + 1), FRAGMENT_(i + 2), FRAGMENT_(i + 3), FRAGMENT_(i + 4), \
      FRAGMENT_(i + 5), FRAGMENT_(i + 6), FRAGMENT_(i + 7)

// N; the numbers of d's operands; those of the five operands that follow; d's operands.
#define WGMMA_(N, D, A, B, C, E, F, G, ...)                                                  \
  template <>                                                                                \
  struct Wgmma<N> {                                                                          \
    DEVICE static void run(int (&d)[N / 8][4], u64 a, u64 b, bool accumulate) {              \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #C                                     \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" D \
                   "}, %" #A ", %" #B ", p; }"                                               \
                   : __VA_ARGS__                                                             \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                     \
    }                                                                                        \
    DEVICE static void run(int (&d)[N / 8][4], const u32 (&a)[4], u64 b, bool accumulate) {  \
      asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #F                                     \
                   ", 0; wgmma.mma_async.sync.aligned.m64n" #N "k256.s32.b1.b1.and.popc {" D \
                   "}, {%" #A ", %" #B ", %" #C ", %" #E "}, %" #G ", p; }"                  \
                   : __VA_ARGS__                                                             \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),                             \
                     "r"(static_cast<int>(accumulate)), "l"(b));                             \
    }                                                                                        \
  };

WGMMA_(16, "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, 13, FRAGMENT_(0), FRAGMENT_(1))
WGMMA_(64, ONES_ TEN_(1) TEN_(2) ", %30, %31", 32, 33, 34, 35, 36, 37, FRAGMENTS_(0))
WGMMA_(80, ONES_ TEN_(1) TEN_(2) TEN_(3), 40, 41, 42, 43, 44, 45, FRAGMENTS_(0), FRAGMENT_(8),
       FRAGMENT_(9))
WGMMA_(128, ONES_ TEN_(1) TEN_(2) TEN_(3) TEN_(4) TEN_(5) ", %60, %61, %62, %63", 64, 65, 66, 67,
       68, 69, FRAGMENTS_(0), FRAGMENTS_(8))
WGMMA_(144, ONES_ TEN_(1) TEN_(2) TEN_(3) TEN_(4) TEN_(5) TEN_(6) ", %70, %71", 72, 73, 74, 75, 76,
       77, FRAGMENTS_(0), FRAGMENTS_(8), FRAGMENT_(16), FRAGMENT_(17))
WGMMA_(256,
       ONES_ TEN_(1) TEN_(2) TEN_(3) TEN_(4) TEN_(5) TEN_(6) TEN_(7) TEN_(8) TEN_(9) TEN_(10)
           TEN_(11) ", %120, %121, %122, %123, %124, %125, %126, %127",
       128, 129, 130, 131, 132, 133, FRAGMENTS_(0), FRAGMENTS_(8), FRAGMENTS_(16), FRAGMENTS_(24))

#undef WGMMA_
#undef FRAGMENTS_
#undef FRAGMENT_
#undef TEN_
#undef ONES_
