// packed_linear on wgmma, both operands by bulk tensor copies: Hopper (sm_90a).
//
// Blocks are persistent, one a multiprocessor. Of warpgroup 0, one thread fills a ring of STAGES
// shared tiles and three warps bring what the epilogue of each tile needs (gemm_epilogue.cuh), one
// tile ahead, into one of two slots. GROUPS further warpgroups multiply.
//
// All groups share a tile, and its filters, and each has STRIPS times 64 rows.
//
// The kernel may start before `prepare` has ended: tiles do not depend on it. The three warps wait
// for it, and the consumers for them.
#pragma once
#include "gemm_epilogue.cuh"
#include "scheduler.cuh"
#include "wgmma_ring.cuh"

template <int GROUPS, int STRIPS, int BN, int STAGES>
struct BulkGemm {
  static constexpr int BM = 64 * STRIPS * GROUPS;
  using Tiles = Ring<BM, STRIPS, BN, STAGES>;
  using Slot = TileSlot<BM, BN>;
  static constexpr int STEP = Tiles::STEP;
  static constexpr int THREADS = 128 * (GROUPS + 1);
  static constexpr int SLOTS = STAGES * Tiles::STAGE, BARRIERS = SLOTS + 2 * Slot::BYTES;
  static constexpr int SHARED = BARRIERS + 16 * STAGES + 32;
  static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
  static_assert(registers_suffice(THREADS, PRODUCER_REGISTERS, GROUPS, CONSUMER_REGISTERS), "");

  Tiles ring;
  u32 slots, barriers;
  int tiles_m, tiles_n, steps;

  DEVICE u32 slot(int n) const { return slots + n % 2 * Slot::BYTES; }
  DEVICE u32 brought(int n) const { return barriers + 8 * (n % 2); }
  DEVICE u32 used(int n) const { return barriers + 16 + 8 * (n % 2); }
  DEVICE int tiles() const { return tiles_m * tiles_n; }

  DEVICE static void run(const Params& p, const TensorMap& words, const TensorMap& filters) {
    const u32 shared = shared_address(shared_memory());
    BulkGemm g;
    g.ring = {shared, shared + BARRIERS};
    g.slots = shared + SLOTS;
    g.barriers = shared + BARRIERS + 16 * STAGES;
    g.tiles_m = (p.rows + BM - 1) / BM;
    g.tiles_n = (COUT + BN - 1) / BN;
    g.steps = (K_BYTES + STEP - 1) / STEP;
    const int thread = thread_index();
    if (thread == 0) {
      g.ring.init(4 * GROUPS);
      for (int n = 0; n < 2; ++n) {
        barrier_init(g.brought(n), 96);
        barrier_init(g.used(n), 4 * GROUPS);
      }
      barrier_init_fence();
    }
    sync_threads();
    if (thread < 128) {
      give_registers<PRODUCER_REGISTERS>();
      if (thread == 0) g.copy(words, filters);
      if (thread >= 32) g.bring(p, uniform(thread / 32 - 1), thread % 32);
    } else {
      take_registers<CONSUMER_REGISTERS>();
      g.consume(p, uniform(thread / 128 - 1), thread % 128);
    }
  }

  DEVICE void copy(const TensorMap& words, const TensorMap& filters) const {
    Cursor<STAGES> at;
    for (int index = block_index(); index < tiles(); index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
#pragma unroll 1
      for (int step = 0; step < steps; ++step, at.next()) {
        const u32 a = ring.stage(at.stage), full = ring.full(at.stage);
        barrier_wait(ring.empty(at.stage), at.parity ^ 1);
        barrier_arrive_expect(full, Tiles::STAGE);
        copy_bulk(a, words, step * STEP, tile.m * BM, full);
        copy_bulk(a + BM * STEP, filters, step * STEP, tile.n * BN, full);
      }
    }
  }

  DEVICE void bring(const Params& p, int warp, int lane) const {
    dependency_wait();
    for (int n = 0, index = block_index(); index < tiles(); ++n, index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      barrier_wait(used(n), n / 2 % 2 ^ 1);
      Slot::fill(p, slot(n), tile.m * BM, tile.n * BN, warp, lane);
      barrier_arrive(brought(n));
    }
  }

  DEVICE void consume(const Params& p, int group, int thread) const {
    const int lane = thread % 32, warp = thread / 32;
    const int strips = group * STRIPS;
    Cursor<STAGES> at;
    int acc[STRIPS][BN / 8][4];
#pragma unroll 1
    for (int n = 0, index = block_index(); index < tiles(); ++n, index += block_count()) {
      const Tile tile = tile_at(index, tiles_m, tiles_n);
      ring.products(acc, at, steps, strips, lane);
      barrier_wait(brought(n), n / 2 % 2);
      // No address of the epilogue stays in a register beside the counts.
      finish_tile<BM, BN>(acc, p, slot(n), strips * 64 + warp * 16, tile.m * BM, tile.n * BN,
                          forget(lane));
      sync_warp();
      if (lane == 0) barrier_arrive(used(n));
    }
  }
};
