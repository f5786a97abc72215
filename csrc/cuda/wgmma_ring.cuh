// A ring of shared stages, and the products of a tile on wgmma m64nNk256 ... and.popc: Hopper.
//
// K comes in steps of 1024 bits: rows of 128 bytes in the 128-byte swizzle, ROWS of the windows and
// below them BN of the filters. A warpgroup multiplies STRIPS times 64 of the rows by all filters.
//
// Every stage has two mbarriers. `full` ends a phase when the bytes of bulk copies have filled the
// stage. `empty` ends one when all warps that multiply it have left the stage.
//
// A consumer leaves a stage only when it has issued the next one's products, so that one stage's
// products are always queued.
//
// One bit is used up faster than L2 delivers it. A wide N makes the operands in shared memory serve
// longest: reading them takes 2 KiB + 32 N bytes per N / 2 clocks of a product.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// A position in the ring, and the parity of the phase that it is in.
template <int STAGES>
struct Cursor {
  int stage = 0, parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <int ROWS, int STRIPS, int BN, int STAGES>
struct Ring {
  static constexpr int STEP = 128;  // bytes of K
  static constexpr int STAGE = (ROWS + BN) * STEP;

  u32 stages, barriers;

  DEVICE u32 stage(int i) const { return stages + i * STAGE; }
  DEVICE u32 full(int i) const { return barriers + 8 * i; }
  DEVICE u32 empty(int i) const { return barriers + 8 * (STAGES + i); }

  DEVICE void init(int leavers) const {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), leavers);
    }
  }

  // Queues the products of a stage: BLOCKS times 256 bits. `strips` are those before this group's.
  template <int BLOCKS>
  DEVICE void multiply(int (&acc)[STRIPS][BN / 8][4], u32 stage, int strips,
                       bool accumulate) const {
    const u64 a = wide_descriptor(stage + strips * 64 * STEP);
    const u64 b = wide_descriptor(stage + ROWS * STEP);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCKS; ++k) {
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        // In units of 16 bytes: 64 rows of 128 bytes to the next strip, 32 bytes along K.
        wgmma_and<BN>(acc[s], a + s * 512 + 2 * k, b + 2 * k, accumulate || k > 0);
      }
    }
    wgmma_commit();
  }

  // The products of a tile, of all K.
  DEVICE void products(int (&acc)[STRIPS][BN / 8][4], Cursor<STAGES>& at, int steps, int strips,
                       int lane) const {
    const auto leave = [&](int stage) {
      if (lane == 0) barrier_arrive(empty(stage));
    };
    int before = at.stage;
    for (int step = 0; step < steps; ++step, at.next()) {
      barrier_wait(full(at.stage), at.parity);
      const u32 from = stage(at.stage);
      // The last step multiplies only as far as K reaches.
      const int rest = (K_BYTES % STEP + 31) / 32;
      if (step < K_BYTES / STEP) {
        multiply<4>(acc, from, strips, step > 0);
      } else if (rest == 1) {
        multiply<1>(acc, from, strips, step > 0);
      } else if (rest == 2) {
        multiply<2>(acc, from, strips, step > 0);
      } else if (rest == 3) {
        multiply<3>(acc, from, strips, step > 0);
      } else {
        multiply<4>(acc, from, strips, step > 0);
      }
      wgmma_wait<1>();
      if (step > 0) leave(before);
      before = at.stage;
    }
    wgmma_wait<0>();
    leave(before);
  }
};

// What producers give up must cover what the consumers take: a block owns as many registers as it
// was launched with, 168 a thread of 384, and would wait forever for one more.
HOST_DEVICE constexpr bool registers_suffice(int threads, int producer, int groups, int consumer) {
  return producer + groups * consumer <= (groups + 1) * (65536 / threads / 8 * 8);
}
