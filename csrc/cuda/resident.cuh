// packed_conv2d on wgmma with weights that stay in shared memory: Hopper (sm_90a), one launch a
// call.
//
// Blocks are persistent, one a multiprocessor. A block copies BN filters into shared memory once,
// counts their bits there, and then its GROUPS warpgroups work alone, each on tiles of 64 output
// pixels of its own, so that one multiplies while another writes. A warpgroup copies the pixels
// that its windows touch, which are one contiguous range, while it multiplies the tile before. The
// windows are never unfolded: each lane reads its fragments of them from those pixels, 16 bytes at
// once, and hands them to wgmma in registers. So a pixel comes from L2 once a tile, not once a tap.
//
// Below the filters lie 16 rows of ones. Their products are the bits set in each window, which the
// and-form needs, and come out in every lane's accumulators: N is BN + 16, an eighth more work for
// BN = 128, instead of counting in the 16 lanes a clock that popcounts have.
//
// Operands read from shared memory: 32 N bytes of filters and 2 KiB of windows per N / 2 clocks of
// a product, that is 92 bytes a clock with N = 144 and 115 with N = 80, of 128 that there are.
#pragma once
#include "epilogue.cuh"

// What lies outside an image reads as these zeros.
constexpr int ZEROS = 16;

template <int GROUPS, int BN>
struct Resident {
  static constexpr int BM = 64;
  static constexpr int THREADS = 128 * GROUPS;
  static constexpr int N = BN + 16;
  static constexpr int TILE = N * 128;  // bytes: 4 products of the filters
  static constexpr int FILL = 4;        // pieces of filters that a thread has on their way

  HOST_DEVICE static int filter_bytes() { return (products() + 3) / 4 * TILE; }
  HOST_DEVICE static int count_bytes() { return KH * KW * BN * 4; }
  HOST_DEVICE static int corr_bytes() { return border_classes() * BN * 4; }

  // Of shared memory; IMAGE is what the pixels of a tile take at most.
  HOST_DEVICE static int shared() {
    return filter_bytes() + count_bytes() + corr_bytes() + GROUPS * 2 * IMAGE + ZEROS;
  }

  // Where things lie in shared memory. Constants, not members: registers are scarce.
  DEVICE static u32 filters() { return shared_address(shared_memory()); }
  // [tap][BN]: bits set in a filter's tap
  DEVICE static u32 counts() { return filters() + filter_bytes(); }
  // [border class][BN]
  DEVICE static u32 corr() { return counts() + count_bytes(); }
  DEVICE static u32 zeros() { return filters() + shared() - ZEROS; }
  // Of this warpgroup, one of two.
  DEVICE static u32 image(int buffer) {
    return corr() + corr_bytes() + (group() * 2 + buffer) * IMAGE;
  }

  DEVICE static int group() { return thread_index() / 128; }
  DEVICE static int thread() { return thread_index() % 128; }
  DEVICE static int lane() { return thread_index() % 32; }

  // There are at least as many blocks as tiles of filters; those of one tile share its rows.
  DEVICE static void run(const Params& p) {
    const int tiles_n = (COUT + BN - 1) / BN, n = block_index() % tiles_n;
    const int sharing = (block_count() - 1 - n) / tiles_n + 1;
    const int first = block_index() / tiles_n + group() * sharing;
    fetch(p, first, 0);
    fill(p, n * BN);
    work(p, n * BN, first, GROUPS * sharing);
  }

  template <int SIZE>
  DEVICE static void copy(u32 to, const unsigned char* from, int bytes) {
    for (int i = thread() * SIZE; i < bytes; i += 128 * SIZE)
      copy_async<SIZE>(to + i, from + i, true);
  }

  // Starts to copy the pixels of a tile, if there is one.
  DEVICE static void fetch(const Params& p, int tile, int buffer) {
    const int first = tile * BM;
    if (first < p.rows) {
      const Span span = span_of(first, (first + BM < p.rows ? first + BM : p.rows) - 1);
      const unsigned char* const from =
          reinterpret_cast<const unsigned char*>(p.words) + span.begin * PIXEL;
      const int bytes = static_cast<int>(span.end - span.begin) * PIXEL;
      const u32 to = image(buffer);
      if (CHUNK == 16) {
        copy<16>(to, from, bytes);
      } else if (CHUNK == 8) {
        copy<8>(to, from, bytes);
      } else {
        copy<4>(to, from, bytes);
      }
    }
    copy_async_commit();
  }

  DEVICE static u32 filter_address(int row, int word) {
    const Slot slot = slot_of(word);
    return filters() + slot.product / 4 * TILE +
           wide_offset(row, slot.product % 4 * 32 + slot.word * 4);
  }

  // The filters from n0 on, the ones below them, and the corrections that follow from them.
  DEVICE static void fill(const Params& p, int n0) {
    const int words = 16 * whole_steps() + 8 * half_steps();
    for (int i = thread_index(); i < KH * KW * BN; i += THREADS) {
      store_shared(counts() + 4 * i, 0);
    }
    for (int i = thread_index(); i < 16 * words; i += THREADS) {
      store_shared(filter_address(BN + i % 16, i / 16), ~0u);
    }
    if (thread_index() < ZEROS / 4) store_shared(zeros() + 4 * thread_index(), 0);
    sync_threads();

    constexpr int MOST = 4;  // words of a piece
    const int size = CHUNK / 4, pieces = BN * (words / size);
    for (int i = thread_index(); i < pieces; i += THREADS * FILL) {
      u32 v[FILL][MOST] = {};
#pragma unroll
      for (int j = 0; j < FILL; ++j) {
        const int piece = i + j * THREADS;
        const int row = piece / (words / size), word = piece % (words / size) * size;
        if (piece >= pieces || n0 + row >= COUT || 4 * word >= K_BYTES) continue;
        const u32* const from = p.filters + static_cast<i64>(n0 + row) * (K_BYTES / 4) + word;
        if (size == 4) {
          load4(v[j], from);
        } else {
          for (int w = 0; w < size; ++w) v[j][w] = load(from + w);
        }
      }
#pragma unroll
      for (int j = 0; j < FILL; ++j) {
        const int piece = i + j * THREADS;
        const int row = piece / (words / size), word = piece % (words / size) * size;
        if (piece >= pieces) continue;
        int bits = 0;
#pragma unroll
        for (int w = 0; w < MOST; ++w) {
          if (w >= size) break;
          store_shared(filter_address(row, word + w), v[j][w]);
          bits += popcount(v[j][w]);
        }
        if (bits > 0) add_shared(counts() + (4 * word / PIXEL * BN + row) * 4, bits);
      }
    }
    fence_async();
    sync_threads();

    const int across = axis_classes(LEFT, RIGHT, BOTH_W);
    for (int i = thread_index(); i < border_classes() * BN; i += THREADS) {
      const Cut h = axis_cut(i / BN / across, TOP, BOTTOM, BOTH_H);
      const Cut w = axis_cut(i / BN % across, LEFT, RIGHT, BOTH_W);
      int sum = 0;
      for (int kh = h.before; kh < KH - h.past; ++kh) {
        for (int kw = w.before; kw < KW - w.past; ++kw) {
          sum += CHANNELS - 2 * load_shared(counts() + ((kh * KW + kw) * BN + i % BN) * 4);
        }
      }
      store_shared(corr() + 4 * i, sum);
    }
    sync_threads();
  }

  struct Corrections {
    u32 first;  // where channel 0 would be

    DEVICE Pair<int> operator()(int label, int column) const {
      u32 v[2];
      load_shared2(v, first + (label * BN + column) * 4);
      return {{static_cast<int>(v[0]), static_cast<int>(v[1])}};
    }
  };

  // The bytes from `k` on of a window, as many as `words` says.
  template <int WORDS>
  DEVICE static void read(u32 (&v)[WORDS], const Window& window, u32 pixels, int k) {
    const int size = CHUNK / 4 < WORDS ? CHUNK / 4 : WORDS;
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      if (w % size) continue;
      const Chunk chunk = chunk_at(k + 4 * w);
      const u32 at =
          reads(window, chunk) ? pixels + static_cast<int>(window.base + chunk.distance) : zeros();
      if (size == 4) {
        load_shared4(reinterpret_cast<u32(&)[4]>(v), at);
      } else if (size == 2) {
        load_shared2(reinterpret_cast<u32(&)[2]>(v[w]), at);
      } else {
        v[w] = load_shared(at);
      }
    }
  }

  // The fragments of a step of K, one for each of its products.
  DEVICE static void gather(u32 (&a)[2][4], const Window (&windows)[2], u32 pixels, int step) {
    const int t = forget(lane()) % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (step < whole_steps()) {
        u32 v[4];
        read(v, windows[h], pixels, 64 * step + 16 * t);
        for (int i = 0; i < 4; ++i) a[i / 2][h + i % 2 * 2] = v[i];
      } else {
        u32 v[2];
        read(v, windows[h], pixels, 64 * step + 8 * t);
        for (int i = 0; i < 2; ++i) a[0][h + i * 2] = v[i];
      }
    }
  }

  DEVICE static u64 descriptor(int product) {
    return wide_descriptor(filters() + product / 4 * TILE) + product % 4 * 2;  // in 16 bytes
  }

  DEVICE static void work(const Params& p, int n0, int first, int stride) {
    const int tiles = (p.rows + BM - 1) / BM, steps = whole_steps() + half_steps();
    int buffer = 0;
    for (int tile = first; tile < tiles; tile += stride, buffer ^= 1) {
      // The tile's pixels are there, and nobody still reads those of the tile before.
      copy_async_wait<0>();
      sync_some(1 + group(), 128);
      fetch(p, tile + stride, buffer ^ 1);

      const u32 pixels = image(buffer);
      const int row = tile * BM + thread() / 32 * 16 + lane() / 4;
      const i64 start = span_of(tile * BM, tile * BM).begin * PIXEL;
      Window windows[2] = {window_of(row, p.rows), window_of(row + 8, p.rows)};
      for (Window& window : windows) window.base -= start;

      int acc[1][N / 8][4];
      u32 a[2][2][4];
      gather(a[0], windows, pixels, 0);
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        wgmma_fence();
        wgmma_and<N>(acc[0], a[step & 1][0], descriptor(2 * step), step > 0);
        if (step < whole_steps()) {
          wgmma_and<N>(acc[0], a[step & 1][1], descriptor(2 * step + 1), true);
        }
        wgmma_commit();
        if (step + 1 < steps) {
          wgmma_wait<1>();  // the products that the next fragments' registers belong to
          gather(a[step + 1 & 1], windows, pixels, step + 1);
        }
      }
      wgmma_wait<0>();
      const int pa[1][2] = {{acc[0][BN / 8][0], acc[0][BN / 8][2]}};
      const int column = forget(n0);
      epilogue<BN / 8, 64>(acc, pa, p, Corrections{corr() - 4 * column},
                           tile * BM + thread() / 32 * 16, column, lane());
    }
    copy_async_wait<0>();
  }
};
