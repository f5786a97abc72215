// packed_linear and packed_conv2d on wgmma m64nNk256 ... and.popc: Hopper (sm_90a).
//
// Blocks are persistent, one a multiprocessor. Of each, warpgroup 0 fills a ring of STAGES shared
// tiles and the other GROUPS warpgroups multiply, STRIPS times 64 windows by BN filters each. K
// comes in steps of 1024 bits: rows of 128 bytes in the 128-byte swizzle.
//
// BULK: the tiles are boxes of two matrices and come by bulk tensor copies (packed_linear). Else
// the windows are gathered by cp.async (packed_conv2d), as in mma_gemm.cuh.
//
// Every stage has two mbarriers. `full` ends a phase when the stage is filled: by the bytes of the
// bulk copies, or by an arrival of each producer thread, which comes after its copies have landed
// and been made visible to wgmma. `empty` ends one when all consumer warps have left the stage.
//
// A consumer leaves a stage only when it has issued the next one's products, so that one stage's
// products are always queued. A producer thread that gathers publishes LAG stages late, to keep
// copies on their way. LAG is at most STAGES - 2: stage i is published once stage i + LAG is
// issued, which needs stage i + LAG - STAGES, left once stage i + LAG - STAGES + 1 is published;
// that is not later than i - 1.
//
// One bit is used up faster than L2 delivers it. A wide N makes the operands in shared memory serve
// longest: reading them takes 2 KiB + 32 N bytes per N / 2 clocks of a product.
#pragma once
#include "epilogue.cuh"
#include "gather.cuh"
#include "scheduler.cuh"

// A position in the ring, and the parity of the phase that it is in.
template <int STAGES>
struct Cursor {
  int stage = 0, parity = 0;
  DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

template <int GROUPS, int STRIPS, int BN, int STAGES, bool BULK>
struct WgmmaGemm {
  static constexpr int STEP = 128;  // bytes of K
  static constexpr int BM = 64 * STRIPS * GROUPS;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int STAGE = (BM + BN) * STEP;
  static constexpr int SHARED = STAGES * STAGE + BM * sizeof(Window) + 16 * STAGES;
  static constexpr int LAG = STAGES - 2;
  static constexpr int PRODUCER_REGISTERS = BULK ? 40 : 56;
  static constexpr int CONSUMER_REGISTERS = BULK ? 232 : 224;
  // What the producers give up must cover what the consumers take: the block owns as many registers
  // as it was launched with, 168 a thread of 384, and would wait forever for one more.
  static constexpr int LAUNCHED = 65536 / THREADS / 8 * 8;
  static_assert(PRODUCER_REGISTERS + GROUPS * CONSUMER_REGISTERS <= (GROUPS + 1) * LAUNCHED);

  u32 ring, barriers;
  Window* windows;
  int tiles_m, tiles_n, steps;

  DEVICE u32 full(int stage) const { return barriers + 8 * stage; }
  DEVICE u32 empty(int stage) const { return barriers + 8 * (STAGES + stage); }

  DEVICE static void run(const Params& p, const TensorMap& words, const TensorMap& filters) {
    unsigned char* const shared = shared_memory();
    WgmmaGemm g;
    g.ring = shared_address(shared);
    g.windows = reinterpret_cast<Window*>(shared + STAGES * STAGE);
    g.barriers = shared_address(g.windows + BM);
    g.tiles_m = (p.rows + BM - 1) / BM;
    g.tiles_n = (COUT + BN - 1) / BN;
    g.steps = (K_BYTES + STEP - 1) / STEP;
    const int thread = thread_index();
    if (thread == 0) {
      for (int i = 0; i < STAGES; ++i) {
        barrier_init(g.full(i), BULK ? 1 : 128);
        barrier_init(g.empty(i), 4 * GROUPS);
      }
      barrier_init_fence();
    }
    sync_threads();
    if (thread < 128) {
      give_registers<PRODUCER_REGISTERS>();
      if (!BULK) {
        g.gather(p, thread);
      } else if (thread == 0) {
        g.copy(words, filters);
      }
    } else {
      take_registers<CONSUMER_REGISTERS>();
      g.consume(p, thread / 128 - 1, thread % 128);
    }
  }

  DEVICE void copy(const TensorMap& words, const TensorMap& filters) const {
    Cursor<STAGES> at;
    for (int index = block_index(); index < tiles_m * tiles_n; index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      for (int step = 0; step < steps; ++step, at.next()) {
        const u32 a = ring + at.stage * STAGE;
        barrier_wait(empty(at.stage), at.parity ^ 1);
        barrier_arrive_expect(full(at.stage), STAGE);
        copy_bulk(a, words, step * STEP, tile.m * BM, full(at.stage));
        copy_bulk(a + BM * STEP, filters, step * STEP, tile.n * BN, full(at.stage));
      }
    }
  }

  DEVICE void publish(Cursor<STAGES>& at) const {
    fence_async();
    barrier_arrive(full(at.stage));
    at.next();
  }

  DEVICE void gather(const Params& p, int thread) const {
    Cursor<STAGES> at, published;
    int behind = 0;  // stages that are issued and not published
    for (int index = block_index(); index < tiles_m * tiles_n; index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      sync_some(1, 128);  // nobody still reads the windows of the tile before
      for (int i = thread; i < BM; i += 128) windows[i] = window_of(tile.m * BM + i, p.rows);
      sync_some(1, 128);
      for (int step = 0; step < steps; ++step, at.next()) {
        const u32 a = ring + at.stage * STAGE;
        barrier_wait(empty(at.stage), at.parity ^ 1);
        gather_step<BM, BN, true, 128>(a, a + BM * STEP, windows, tile.n * BN, p, step * STEP,
                                       thread);
        copy_async_commit();
        if (behind < LAG) {
          ++behind;
        } else {
          copy_async_wait<LAG>();
          publish(published);
        }
      }
    }
    copy_async_wait<0>();
    for (; behind > 0; --behind) publish(published);
  }

  // Queues the products of a stage: BLOCKS times 256 bits.
  template <int BLOCKS>
  DEVICE void multiply(int (&acc)[STRIPS][BN / 8][4], u32 stage, int group, bool accumulate) const {
    const u64 a = wide_descriptor(stage + group * STRIPS * 64 * STEP);
    const u64 b = wide_descriptor(stage + BM * STEP);
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

  DEVICE void consume(const Params& p, int group, int thread) const {
    const int lane = thread % 32, warp = thread / 32;
    Cursor<STAGES> at;
    int acc[STRIPS][BN / 8][4];
    for (int index = block_index(); index < tiles_m * tiles_n; index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      int before = at.stage;
      for (int step = 0; step < steps; ++step, at.next()) {
        barrier_wait(full(at.stage), at.parity);
        const u32 stage = ring + at.stage * STAGE;
        // The last step multiplies only as far as K reaches.
        const int rest = (K_BYTES % STEP + 31) / 32;
        if (step < K_BYTES / STEP) {
          multiply<4>(acc, stage, group, step > 0);
        } else if (rest == 1) {
          multiply<1>(acc, stage, group, step > 0);
        } else if (rest == 2) {
          multiply<2>(acc, stage, group, step > 0);
        } else if (rest == 3) {
          multiply<3>(acc, stage, group, step > 0);
        } else {
          multiply<4>(acc, stage, group, step > 0);
        }
        wgmma_wait<1>();
        if (step > 0 && lane == 0) barrier_arrive(empty(before));
        before = at.stage;
      }
      wgmma_wait<0>();
      if (lane == 0) barrier_arrive(empty(before));

      const int first_row = tile.m * BM + group * STRIPS * 64 + warp * 16;
      int pa[STRIPS][2];
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int m = first_row + s * 64 + lane / 4 + 8 * h;
          pa[s][h] = m < p.rows ? load(p.pa + m) : 0;
        }
      }
      epilogue<BN / 8, 64>(acc, pa, p, PreparedCorrections{p.corr}, first_row, tile.n * BN, lane);
    }
  }
};
