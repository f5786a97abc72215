// What the and-form needs besides popcount(a and w):
//
//   dot = corr[border class, n] - 2 pa[m] + 4 popcount(a and w)
//   corr  sum over the taps inside the image of (channels - 2 popcount(w[tap, n]))
//   pa    bits set in the window of pixel m, here a row of a matrix
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// Bits set in SIZE bytes, which one load brings.
template <int SIZE>
DEVICE int popcount_bytes(const unsigned char* p) {
  if (SIZE == 4) return popcount(load(reinterpret_cast<const u32*>(p)));
  u32 v[4];
  load4(v, reinterpret_cast<const u32*>(p));
  return popcount(v[0]) + popcount(v[1]) + popcount(v[2]) + popcount(v[3]);
}

// One warp a filter, SIZE bytes a lane: the taps' counts by the lanes, then the sums of every
// border class.
template <int SIZE>
DEVICE void prepare_filter(const Params& p, int n, int lane) {
  const unsigned char* filter =
      reinterpret_cast<const unsigned char*>(p.filters) + static_cast<i64>(n) * K_BYTES;
  const int classes = border_classes();
  const int across = axis_classes(LEFT, RIGHT, BOTH_W);
  for (int label = 0; label < classes; ++label) {
    const Cut h = axis_cut(label / across, TOP, BOTTOM, BOTH_H);
    const Cut w = axis_cut(label % across, LEFT, RIGHT, BOTH_W);
    int sum = 0;
#pragma unroll 2
    for (int at = SIZE * lane; at < K_BYTES; at += 32 * SIZE) {
      const int tap = at / PIXEL, kh = tap / KW, kw = tap % KW;
      const bool inside = kh >= h.before && kh < KH - h.past && kw >= w.before && kw < KW - w.past;
      if (inside) sum -= 2 * popcount_bytes<SIZE>(filter + at);
    }
    for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    // A window that is cut on both sides may have no tap left; the others never go below zero.
    const int rows = KH - h.before - h.past, columns = KW - w.before - w.past;
    if (rows > 0 && columns > 0) sum += rows * columns * CHANNELS;
    if (lane == 0) store(p.corr + static_cast<i64>(label) * COUT + n, sum);
  }
}

// One warp a row of the matrix.
template <int SIZE>
DEVICE void prepare_window(const Params& p, int m, int lane) {
  const unsigned char* const row =
      reinterpret_cast<const unsigned char*>(p.words) + static_cast<i64>(m) * K_BYTES;
  int count = 0;
#pragma unroll 2
  for (int at = SIZE * lane; at < K_BYTES; at += 32 * SIZE) count += popcount_bytes<SIZE>(row + at);
  for (int mask = 16; mask > 0; mask >>= 1) count += shuffle_xor(count, mask);
  if (lane == 0) store(p.pa + m, count);
}

// Blocks of WARPS warps: first one warp for each filter, then one for each window if they are
// asked. The kernel behind this one may start at once.
template <int WARPS>
struct Prepare {
  DEVICE static void run(const Params& p) {
    dependents_may_start();
    CHUNK == 16 ? run<16>(p) : run<4>(p);
  }

  template <int SIZE>
  DEVICE static void run(const Params& p) {
    const int warp = block_index() * WARPS + thread_index() / 32, lane = thread_index() % 32;
    const int filters = (COUT + WARPS - 1) / WARPS * WARPS;
    if (warp < filters) {
      if (warp < COUT) prepare_filter<SIZE>(p, warp, lane);
    } else if (WINDOWS && warp - filters < p.rows) {
      prepare_window<SIZE>(p, warp - filters, lane);
    }
  }
};
