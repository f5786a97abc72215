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
// mbarrier, whose phase ends when they are there.
//
// Below the filters lie 8 rows of ones. Their products are the bits set in each window, which the
// and-form needs, and come out in every lane's accumulators: N is BN + 16, an eighth more work for
// BN = 128, instead of counting in the 16 lanes a clock that popcounts have.
#pragma once
#include "outputs.cuh"
#include "pixels.cuh"

template <int GROUPS, int BN, int STRIPS>
struct Resident {
  static constexpr int BM = 64 * STRIPS;
  static constexpr int THREADS = 128 * GROUPS;
  static constexpr int N = BN + 16;
  // Products whose fragments are read together, and how often that is for a strip.
  static constexpr int AHEAD = GROUPS == 4 || STRIPS == 2 ? 3 : 4;
  HOST_DEVICE static int turns() { return (products() + AHEAD - 1) / AHEAD; }
  using F = Filters<BN, THREADS>;

  // Of shared memory; IMAGE is what the lines of a tile take at most.
  HOST_DEVICE static int total_bytes() { return MOMENTS ? GROUPS * 4 * 2 * BN * 8 : 0; }
  HOST_DEVICE static int shared() {
    return F::filter_bytes() + F::line_bytes() + F::table_bytes() + total_bytes() + label_bytes() +
           GROUPS * 2 * IMAGE + barrier_bytes();
  }

  DEVICE static F filters() {
    const u32 start = shared_address(shared_memory()), lines = start + F::filter_bytes();
    return {start, lines, lines + F::line_bytes()};
  }
  DEVICE static u32 totals() { return filters().table + F::table_bytes(); }
  DEVICE static u32 warp_totals() { return totals() + thread_index() / 32 * 2 * BN * 8; }
  // What each row and each column of the output adds to the border class.
  HOST_DEVICE static int label_bytes() {
    const int words = border_classes() > 1 ? OH + OW : 0;
    return BOXES ? (words + 31) / 32 * 128 : (words + 3) / 4 * 16;  // boxes start at 128
  }
  DEVICE static u32 labels() { return totals() + total_bytes(); }
  // Of this warpgroup, one of two.
  DEVICE static u32 image(int buffer) {
    return labels() + label_bytes() + (group() * 2 + buffer) * IMAGE;
  }
  // Of bulk copies: of the filters, and of what this warpgroup's buffer waits for.
  HOST_DEVICE static int barrier_bytes() { return BOXES ? 16 * (GROUPS + 1) : 0; }
  DEVICE static u32 filled() { return labels() + label_bytes() + GROUPS * 2 * IMAGE; }
  DEVICE static u32 fetched(int buffer) { return filled() + 8 + (group() * 2 + buffer) * 8; }

  DEVICE static int group() { return thread_index() / 128; }
  DEVICE static int thread() { return thread_index() % 128; }
  DEVICE static int lane() { return thread_index() % 32; }

  DEVICE static void run(const Params& p) { start(p, nullptr, nullptr); }
  DEVICE static void run(const Params& p, const TensorMap& words, const TensorMap& filters) {
    start(p, &words, &filters);
  }

  // There are at least as many blocks as tiles of filters; those of one tile share its rows.
  DEVICE static void start(const Params& p, const TensorMap* words, const TensorMap* map) {
    const int tiles_n = (COUT + BN - 1) / BN, n = block_index() % tiles_n;
    const int sharing = (block_count() - 1 - n) / tiles_n + 1;
    const int first = block_index() / tiles_n + group() * sharing;
    if (BOXES) barriers(words, map);
    dependency_wait();
    dependents_may_start();
    // All that comes from far away is on its way before anything else is done.
    if (F::by_map() && thread_index() / 32 == THREADS / 32 - 1 && elected()) {
      filters().copy(*map, n * BN, filled());
    }
    Origin from = {};
    if (BOXES) from = fetch(p, words, first, 0);
    const Limits limits = filters().fill(p, n * BN);
    if (!BOXES) from = fetch(p, words, first, 0);
    prepare();
    filters().store_limits(limits);
    // The filters and their channels' values.
    if (BOXES) {
      copy_async_wait<0>();
    } else {
      copy_async_wait<1>();
    }
    fence_async();
    if (F::by_map()) barrier_wait(filled(), 0);
    sync_threads();
    filters().tables(thread_index() / 32, lane());
    sync_threads();
    work(p, words, n * BN, first, GROUPS * sharing, from);
    if (MOMENTS) finish(p, n * BN);
  }

  DEVICE static void barriers(const TensorMap* words, const TensorMap* map) {
    const u32 first = filled();
    if (thread_index() == 0) {
      for (int i = 0; i <= 2 * GROUPS; ++i) barrier_init(first + 8 * i, 1);
      barrier_init_fence();
      prefetch_map(*words);
      if (F::by_map()) prefetch_map(*map);
    }
    sync_threads();
  }

  // What no copy brings.
  DEVICE static void prepare() {
    filters().ones();
    for (int buffer = 0; buffer < 2; ++buffer) {
      if (BOXES) {
        clear_leads(image(buffer), thread());
      } else {
        clear_borders(image(buffer), thread());
      }
    }
    if (border_classes() > 1) {  // rows by the first warps, columns by the last
#pragma unroll 2
      for (int turn = 0; turn < (OH + THREADS - 1) / THREADS; ++turn) {
        const int i = turn * THREADS + thread_index();
        if (i < OH) store_shared(labels() + 4 * i, row_class(i));
      }
#pragma unroll 2
      for (int turn = 0; turn < (OW + THREADS - 1) / THREADS; ++turn) {
        const int i = turn * THREADS + THREADS - 1 - thread_index();
        if (i < OW) store_shared(labels() + 4 * (OH + i), column_class(i));
      }
    }
    for (int i = lane(); i < total_bytes() / (THREADS / 32) / 4; i += 32) {
      store_shared(warp_totals() + 4 * i, 0);
    }
  }

  // Starts to copy the lines of a tile, if there is one; where they begin.
  DEVICE static Origin fetch(const Params& p, const TensorMap* words, int tile, int buffer) {
    const int first = tile * BM;
    const Origin from = origin_of(first);
    if (BOXES) {
      if (first < p.rows && thread() < 32 && elected()) {
        copy_boxes<BM>(image(buffer), *words, first, from, fetched(buffer));
      }
      return from;
    }
    if (first < p.rows) copy_lines(image(buffer), p, from.image * HP + from.line, thread());
    copy_async_commit();
    return from;
  }

  // Queues the products of a tile, those of a strip after the other's; the fragments are theirs
  // until they are waited for.
  DEVICE static void multiply(int (&acc)[STRIPS][N / 8][4], u32 (&a)[2][AHEAD][4],
                              const Reader (&readers)[STRIPS]) {
#pragma unroll
    for (int turn = 0; turn < STRIPS * turns(); ++turn) {
      const int s = turn / turns(), first = turn % turns() * AHEAD;
      if (turn >= 2) wgmma_wait<1>();  // those that these registers belong to
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i < products()) readers[s].read(a[turn % 2][i], first + i);
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        if (first + i >= products()) continue;
        wgmma_and<N>(acc[s], a[turn % 2][i], filters().descriptor(first + i), first + i > 0);
      }
      wgmma_commit();
    }
  }

  DEVICE static void work(const Params& p, const TensorMap* words, int n0, int first, int stride,
                          Origin from) {
    const int tiles = (p.rows + BM - 1) / BM;
    const F filters = Resident::filters();
    Moments<BN, STRIPS> moments;
    const bool both = only_signs() && THRESHOLD && filters.any_both();
    int buffer = 0, parity = 0, seen = 0;
    for (int tile = first; tile < tiles; tile += stride, parity ^= buffer, buffer ^= 1) {
      // The tile's pixels are there, and nobody still reads those of the tile before.
      if (!BOXES) copy_async_wait<0>();
      if (BOXES) barrier_wait(fetched(buffer), parity);
      sync_some(1 + group(), 128);
      const Origin next = fetch(p, words, tile + stride, buffer ^ 1);

      // Of the warp's 16 windows a strip this lane finds one; those past the last are the last.
      const int top = tile * BM + thread() / 32 * (BM / 4), window = top + lane() % (BM / 4);
      const Pixel pixel = pixel_of(window < p.rows ? window : p.rows - 1);
      const int place = place_of(pixel, from);
      const u32 label = border_classes() > 1 ? load_shared(labels() + 4 * pixel.oh) +
                                                   load_shared(labels() + 4 * (OH + pixel.ow))
                                             : 0;
      from = next;
      TileRow rows[STRIPS][2];
      Reader readers[STRIPS];
      for (int s = 0; s < STRIPS; ++s) {
        for (int h = 0; h < 2; ++h) {
          const int row = 16 * s + lane() / 4 + 8 * h;
          rows[s][h] = {top + row,
                        border_classes() > 1 ? static_cast<int>(shuffle(label, row)) : 0};
        }
        readers[s] = Reader::of<STRIPS>(image(buffer), place, s, lane());
      }
      const int column = forget(n0);
      int acc[STRIPS][N / 8][4];
      u32 a[2][AHEAD][4];
      multiply(acc, a, readers);
      // What the epilogue reads comes while the products run.
      Comparisons<BN> comparisons[STRIPS];
      for (int s = 0; s < STRIPS; ++s) {
        if (only_signs()) comparisons[s].fetch(filters, 0, rows[s], lane() % 4);
      }
      Residuals<BN, STRIPS> residuals;
      residuals.fetch(p, rows, column, lane() % 4);
      if (only_signs()) {
        if (STRIPS > 1) {  // while the products of the last strip run, in one turn or more
          if (turns() == 1) {
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
