// packed_linear and packed_conv2d on wgmma, windows gathered: Hopper (sm_90a).
//
// Blocks are persistent, one a multiprocessor. Of each, warpgroup 0 fills a ring of STAGES shared
// tiles by cp.async, as mma_gemm.cuh does, and the other GROUPS warpgroups multiply, STRIPS times
// 64 windows by BN filters each. Matrices whose rows bulk copies can fetch go to bulk_gemm.cuh.
//
// A producer thread publishes LAG stages late, to keep copies on their way. LAG is at most
// STAGES - 2: stage i is published once stage i + LAG is issued, which needs stage i + LAG -
// STAGES, left once stage i + LAG - STAGES + 1 is published; that is not later than i - 1.
#pragma once
#include "epilogue.cuh"
#include "gather.cuh"
#include "scheduler.cuh"
#include "wgmma_ring.cuh"

template <int GROUPS, int STRIPS, int BN, int STAGES>
struct WgmmaGemm {
  static constexpr int BM = 64 * STRIPS * GROUPS;
  using Tiles = Ring<BM, STRIPS, BN, STAGES>;
  static constexpr int STEP = Tiles::STEP;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int SHARED = STAGES * Tiles::STAGE + BM * sizeof(Window) + 16 * STAGES;
  static constexpr int LAG = STAGES - 2;
  static constexpr int PRODUCER_REGISTERS = 56, CONSUMER_REGISTERS = 224;
  static_assert(registers_suffice(THREADS, PRODUCER_REGISTERS, GROUPS, CONSUMER_REGISTERS), "");

  Tiles ring;
  Window* windows;
  int tiles_m, tiles_n, steps;

  DEVICE static void run(const Params& p) {
    unsigned char* const shared = shared_memory();
    WgmmaGemm g;
    g.windows = reinterpret_cast<Window*>(shared + STAGES * Tiles::STAGE);
    g.ring = {shared_address(shared), shared_address(g.windows + BM)};
    g.tiles_m = (p.rows + BM - 1) / BM;
    g.tiles_n = (COUT + BN - 1) / BN;
    g.steps = (K_BYTES + STEP - 1) / STEP;
    const int thread = thread_index();
    if (thread == 0) {
      g.ring.init(128, 4 * GROUPS);
      barrier_init_fence();
    }
    sync_threads();
    if (thread < 128) {
      give_registers<PRODUCER_REGISTERS>();
      g.gather(p, thread);
    } else {
      take_registers<CONSUMER_REGISTERS>();
      g.consume(p, thread / 128 - 1, thread % 128);
    }
  }

  DEVICE void publish(Cursor<STAGES>& at) const {
    fence_async();
    barrier_arrive(ring.full(at.stage));
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
        const u32 a = ring.stage(at.stage);
        barrier_wait(ring.empty(at.stage), at.parity ^ 1);
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

  DEVICE void consume(const Params& p, int group, int thread) const {
    const int lane = thread % 32, warp = thread / 32;
    Cursor<STAGES> at;
    int acc[STRIPS][BN / 8][4];
    for (int index = block_index(); index < tiles_m * tiles_n; index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      ring.products(acc, at, steps, group * STRIPS, lane);
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
