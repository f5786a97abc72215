// packed_conv2d on wgmma with weights that stay in shared memory: Hopper (sm_90a), one launch a
// call, which overlaps with the end of the one before.
//
// Blocks are persistent, one a multiprocessor. A block copies BN filters into shared memory once,
// and then its GROUPS warpgroups work alone, each on tiles of its own, so that one multiplies while
// another writes. A tile is STRIPS times 64 output pixels: what a tile costs, and what its epilogue
// reads of a channel from shared memory, serves all of them. A warpgroup copies the lines that its
// windows touch while it multiplies the tile before. The windows are never unfolded: each warp
// reads its fragments of them from those lines and hands them to wgmma in registers. So a pixel
// comes from L2 once a tile, not once a tap.
//
// With tensor maps (BOXES > 0) filters and lines come by bulk copies, which one lane starts:
// filters in the layout of wgmma, lines with the zeros around them. A buffer of lines has an
// mbarrier, whose phase ends when they are there. Before the first tile the last warpgroup starts
// all copies, and the first one or two make the table of what they have brought.
//
// With TURNS warpgroups queue their products one after the other, so that one multiplies while the
// others write: left alone they share the tensor core, end together and leave it idle together. Two
// named barriers a tile put the tiles of a block in a row, as CUTLASS's OrderedSequenceBarrier does
// with mbarriers and FlashAttention-3 with named ones. A named barrier counts threads, so whoever
// waits must be given its turn exactly once: the first tile of a block does not wait, the last one
// gives no turn, and a block of fewer tiles than warpgroups gives as many as it has.
//
// Below the filters lie rows of ones (masks.cuh), so N is BN + 16, an eighth more work for BN =
// 128, instead of counting in the 16 lanes a clock that popcounts have.
#pragma once
#include "outputs.cuh"
#include "pixels.cuh"

template <int GROUPS, int BN, int STRIPS, bool TURNS = false>
struct Resident {
  static constexpr int BM = 64 * STRIPS;
  static constexpr int THREADS = 128 * GROUPS;
  static constexpr int N = BN + MASKS;
  // Sets of registers for fragments, products whose fragments are read together into one, and how
  // many of these batches a strip has. A read is answered when all products that its warp has
  // queued have begun: with three sets nothing that is multiplied next waits for one.
  static constexpr int SETS = TURNS && STRIPS == 1 ? 3 : 2;
  static constexpr int AHEAD = GROUPS == 4 || STRIPS == 2 || TURNS ? 3 : 4;
  HOST_DEVICE static int batches() { return (products() + AHEAD - 1) / AHEAD; }
  using F = Filters<BN, THREADS>;

  // Of shared memory; IMAGE is what the lines of a tile take at most.
  HOST_DEVICE static int total_bytes() { return MOMENTS ? GROUPS * 4 * 2 * BN * 8 : 0; }
  HOST_DEVICE static int shared() {
    return F::filter_bytes() + F::line_bytes() + F::table_bytes() + total_bytes() +
           GROUPS * 2 * IMAGE + barrier_bytes();
  }

  DEVICE static F filters() {
    const u32 start = shared_address(shared_memory()), lines = start + F::filter_bytes();
    return {start, lines, lines + F::line_bytes()};
  }
  DEVICE static u32 totals() { return filters().table + F::table_bytes(); }
  DEVICE static u32 warp_totals() { return totals() + thread_index() / 32 * 2 * BN * 8; }
  // Of a warpgroup, one of two.
  DEVICE static u32 image(int group, int buffer) {
    return totals() + total_bytes() + (group * 2 + buffer) * IMAGE;
  }
  // Of bulk copies: of the filters, and of what a warpgroup's buffer waits for.
  HOST_DEVICE static int barrier_bytes() { return BOXES ? 16 * (GROUPS + 1) : 0; }
  DEVICE static u32 filled() { return image(GROUPS, 0); }
  DEVICE static u32 fetched(int group, int buffer) {
    return filled() + 8 + (group * 2 + buffer) * 8;
  }

  // Named barriers: that of a warpgroup's own threads, and the one where it waits for its turn.
  static_assert(2 * GROUPS < 16, "a block has 16 barriers, of which 0 is that of all threads");
  DEVICE static int own_barrier(int group) { return 1 + group; }
  DEVICE static int turn_barrier(int group) { return 1 + GROUPS + group; }

  DEVICE static int group() { return thread_index() / 128; }
  DEVICE static int thread() { return thread_index() % 128; }
  DEVICE static int lane() { return thread_index() % 32; }

  DEVICE static void run(const Params& p) { start(p, nullptr, nullptr); }
  DEVICE static void run(const Params& p, const TensorMap& words, const TensorMap& filters) {
    start(p, &words, &filters);
  }

  // There are at least as many blocks as tiles of filters; those of one tile share its rows.
  DEVICE static void start(const Params& p, const TensorMap* words, const TensorMap* map) {
    const u32 tiles_n = (COUT + BN - 1) / BN, block = block_index(), n = block % tiles_n;
    const u32 sharing = (block_count() + tiles_n - 1 - n) / tiles_n, first = block / tiles_n;
    const int n0 = n * BN;
    const bool last = group() == GROUPS - 1;
    if (BOXES && last) barriers(words, map);
    // All that comes from far away is on its way before anything else is done.
    const bool making = group() < BN / 64;  // the table, later
    const bool settled = !BOXES && p.settled;
    Limits limits = {};
    if (!settled) limits = wait_for_limits(p, n0);
    filters().fill(p, n0);
    if (settled) limits = wait_for_limits(p, n0);
    if (!making) {
      if (BOXES && last) copy(p, words, map, n0, first, sharing);
      filters().values(p, n0);
    }
    const bool copied = !F::by_map() || !only_signs();  // by cp.async
    if (copied) copy_async_commit();
    if (!BOXES) {
      fetch(p, nullptr, group(), (first + group() * sharing) * BM, 0);
      filters().store_masks(0);
      for (int buffer = 0; buffer < 2; ++buffer) clear_borders(image(group(), buffer), thread());
    }
    for (int i = lane(); i < total_bytes() / (THREADS / 32) / 16; i += 32) {
      store_shared4(warp_totals() + 16 * i, {0, 0, 0, 0});
    }
    // The filters, and what is known of their channels. Apart, so that those that make the table
    // carry no flag.
    bool both;
    if (making) {
      both = together(false, copied);
    } else {
      both = together(F::owning() && filters().store_limits(limits), copied);
    }
    if (BOXES) barrier_wait(filled(), 0);
    for (int pass = 0; pass < mask_passes(); ++pass) {
      if (pass > 0) {
        sync_threads();
        filters().store_masks(pass);
        fence_async();
        sync_threads();
      }
      if (making) filters().tables(pass, both);
    }
    sync_threads();
    work(p, words, n0, (first + group() * sharing) * BM, GROUPS * sharing * BM, both);
    if (MOMENTS) finish(p, n0);
  }

  // Waits for the kernel before. The thresholds of this thread's channel, if it has one.
  DEVICE static Limits wait_for_limits(const Params& p, int n0) {
    dependency_wait();
    dependents_may_start();
    return F::owning() ? F::limits(p, n0) : Limits{};
  }

  // Waits for all threads. Whether some channel has two bounds.
  DEVICE static bool together(bool both, bool copied) {
    if (!BOXES) {
      copy_async_wait<1>();
    } else if (copied) {
      copy_async_wait<0>();
    }
    filters().positive_zero();
    if (!F::by_map()) fence_async();
    if (only_signs() && THRESHOLD) return sync_threads_any(both);
    sync_threads();
    return false;
  }

  // What the last warpgroup needs before it starts copies, and what no copy brings.
  DEVICE static void barriers(const TensorMap* words, const TensorMap* map) {
    const int warp = thread() / 32;
    if (warp == 2 && elected()) {
      for (int i = 0; i <= 2 * GROUPS; ++i) barrier_init(filled() + 8 * i, 1);
      barrier_init_fence();
    }
    if (warp == 3) {
      clear_leads(image(0, 0), GROUPS * 2 * BOXES, lane());
      if (elected()) {
        prefetch_map(*words);
        if (F::by_map()) prefetch_map(*map);
      }
    }
    sync_some(own_barrier(GROUPS - 1), 128);
  }

  // Starts the first bulk copies of all warpgroups, by the warps of the last one.
  DEVICE static void copy(const Params& p, const TensorMap* words, const TensorMap* map, int n0,
                          int first, int sharing) {
    const int warp = thread() / 32;
    if (warp == 3 && elected()) filters().copy(*map, n0, filled());
    if (warp < GROUPS) fetch(p, words, warp, (first + warp * sharing) * BM, 0, lane());
  }

  // Starts to copy the lines of a tile of a warpgroup, if there is one, by its threads, of which
  // bulk copies take the first 32; where they begin.
  DEVICE static Origin fetch(const Params& p, const TensorMap* words, int group, u32 first,
                             int buffer, int thread = Resident::thread()) {
    const Origin from = origin_of(first);
    const bool some = first < static_cast<u32>(p.rows);
    if (BOXES) {
      if (some && thread < 32 && elected()) {
        copy_boxes<BM>(image(group, buffer), *words, first, from, fetched(group, buffer));
      }
      return from;
    }
    if (some) {
      copy_lines(image(group, buffer), p, from.image * HP + from.line, thread);
    }
    copy_async_commit();
    return from;
  }

  // Queues the products of a tile, those of a strip after the other's; the fragments are theirs
  // until they are waited for.
  DEVICE static void multiply(int (&acc)[STRIPS][N / 8][4], u32 (&a)[SETS][AHEAD][4],
                              const Reader (&readers)[STRIPS]) {
#pragma unroll
    for (int batch = 0; batch < STRIPS * batches(); ++batch) {
      const int s = batch / batches(), first = batch % batches() * AHEAD;
      if (batch >= 2) wgmma_wait<1>();  // those that these registers belong to
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i < products()) readers[s].read(a[batch % 2][i], first + i);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i >= products()) continue;
        wgmma_and<N>(acc[s], a[batch % 2][i], filters().descriptor(first + i), first + i > 0);
      }
      wgmma_commit();
    }
  }

  // The same in turn: `after` a tile of the warpgroup before, and `before` one of the next. As many
  // fragments as there are registers for have been read when the turn comes.
  DEVICE static void multiply_in_turn(int (&acc)[STRIPS][N / 8][4], u32 (&a)[SETS][AHEAD][4],
                                      const Reader (&readers)[STRIPS], bool after, bool before) {
    const int all = STRIPS * batches();
#pragma unroll
    for (int batch = 0; batch < SETS; ++batch) {
      if (batch < all) read(a[batch], readers, batch);
    }
    sync_if(after, turn_barrier(group()), 256);
#pragma unroll
    for (int batch = 0; batch < all; ++batch) {
      const int s = batch / batches(), first = batch % batches() * AHEAD;
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i >= products()) continue;
        wgmma_and<N>(acc[s], a[batch % SETS][i], filters().descriptor(first + i), first + i > 0);
      }
      wgmma_commit();
      const int next = batch + SETS - 1;
      if (batch > 0 && next < all) {
        wgmma_wait<1>();  // for those of the batch before, to which the registers belong
        read(a[next % SETS], readers, next);
      }
    }
    arrive_if(before, turn_barrier(group() < GROUPS - 1 ? group() + 1 : 0), 256);
  }

  // The fragments of a batch.
  DEVICE static void read(u32 (&a)[AHEAD][4], const Reader (&readers)[STRIPS], int batch) {
    const int first = batch % batches() * AHEAD;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (first + i < products()) readers[batch / batches()].read(a[i], first + i);
    }
  }

  // Tiles that start at row `first` and every `stride`th one.
  DEVICE static void work(const Params& p, const TensorMap* words, int n0, u32 first, u32 stride,
                          bool both) {
    const F filters = Resident::filters();
    Moments<BN, STRIPS> moments;
    Origin from = origin_of(first);
    int buffer = 0, parity = 0, seen = 0;
    for (u32 start = first; start < static_cast<u32>(p.rows);
         start += stride, parity ^= buffer, buffer ^= 1) {
      // The tile's pixels are there, and nobody still reads those of the tile before.
      if (!BOXES) copy_async_wait<0>();
      if (BOXES) barrier_wait(fetched(group(), buffer), parity);
      sync_some(own_barrier(group()), 128);
      const Origin next = fetch(p, words, group(), start + stride, buffer ^ 1);

      // Of the warp's 16 windows a strip this lane finds one; those past the last are the last.
      const int top = start + thread() / 32 * (BM / 4), window = top + lane() % (BM / 4);
      const Pixel pixel = pixel_of(window < p.rows ? window : p.rows - 1);
      const int place = place_of(pixel, from);
      const u32 label = border_classes() > 1 ? border_class(pixel) : 0;
      from = next;
      TileRow rows[STRIPS][2];
      Reader readers[STRIPS];
      for (int s = 0; s < STRIPS; ++s) {
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * s + lane() / 4 + 8 * h;
          rows[s][h] = {top + row,
                        border_classes() > 1 ? static_cast<int>(shuffle(label, row)) : 0};
        }
        readers[s] = Reader::of<STRIPS>(image(group(), buffer), place, s, lane());
      }
      const int column = forget(n0);
      int acc[STRIPS][N / 8][4];
      u32 a[SETS][AHEAD][4];
      if constexpr (TURNS) {
        multiply_in_turn(acc, a, readers, group() > 0 || start != first,
                         start + stride / GROUPS < static_cast<u32>(p.rows));
      } else {
        multiply(acc, a, readers);
      }
      // What the epilogue reads comes while the products run.
      Comparisons<BN> comparisons[STRIPS];
      for (int s = 0; s < STRIPS; ++s) {
        if (only_signs()) comparisons[s].fetch(filters, 0, rows[s], lane() % 4);
      }
      Residuals<BN, STRIPS> residuals;
      residuals.fetch(p, rows, column, lane() % 4);
      if (only_signs()) {
        if (STRIPS > 1) {  // while the products of the last strip run, in one batch or more
          if (batches() == 1) {
            wgmma_wait<1>();
          } else {
            wgmma_wait<2>();
          }
          signs(acc[0], filters, comparisons[0], both, p, rows[0], column, lane());
        }
        wgmma_wait<0>();
        signs(acc[STRIPS - 1], filters, comparisons[STRIPS - 1], both, p, rows[STRIPS - 1], column,
              lane());
      } else {
        wgmma_wait<0>();
        outputs(acc, filters, p, rows, residuals, moments, column, lane());
      }
      if (MOMENTS && ++seen == Moments<BN, STRIPS>::most_tiles()) {
        moments.flush(warp_totals(), lane());
        seen = 0;
      }
    }
    if (!BOXES) copy_async_wait<0>();
    if (MOMENTS) moments.flush(warp_totals(), lane());
  }

  // Adds this block's totals to the call's: exact, so that their order does not matter.
  DEVICE static void finish(const Params& p, int n0) {
    sync_threads();
    for (int i = thread_index(); i < 2 * BN; i += THREADS) {
      const int channel = n0 + i % BN;
      if (channel >= COUT) continue;
      u64 total = 0;
      for (int warp = 0; warp < THREADS / 32; ++warp) {
        u32 v[2];
        load_shared2(v, totals() + (warp * 2 * BN + i) * 8);
        total += static_cast<u64>(v[1]) << 32 | v[0];
      }
      add_global(p.moments + i / BN * COUT + channel, total);
      if (i < BN && block_index() < (COUT + BN - 1) / BN) {
        store(p.moments + 2 * COUT + channel, static_cast<u64>(p.rows));
      }
    }
  }
};
