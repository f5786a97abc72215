// What the and-form needs besides popcount(a and w):
//
//   dot = corr[border class, n] - 2 pa[m] + 4 popcount(a and w)
//   corr  sum over the taps inside the image of (channels - 2 popcount(w[tap, n]))
//   pa    bits set in the window of pixel m
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

DEVICE int popcount_bytes(const unsigned char* p, int bytes) {
  int count = 0;
  for (int i = 0; i < bytes; i += 4) count += popcount(load(reinterpret_cast<const u32*>(p + i)));
  return count;
}

// One warp a filter: the taps' counts by the lanes, then the sums of every border class.
DEVICE void prepare_filter(const Params& p, int n, int lane) {
  const unsigned char* filter =
      reinterpret_cast<const unsigned char*>(p.filters) + static_cast<i64>(n) * K_BYTES;
  const int classes = border_classes();
  const int across = axis_classes(LEFT, RIGHT, BOTH_W);
  for (int label = 0; label < classes; ++label) {
    const Cut h = axis_cut(label / across, TOP, BOTTOM, BOTH_H);
    const Cut w = axis_cut(label % across, LEFT, RIGHT, BOTH_W);
    int sum = 0;
    for (int at = 4 * lane; at < K_BYTES; at += 128) {
      const int tap = at / PIXEL, kh = tap / KW, kw = tap % KW;
      const bool inside = kh >= h.before && kh < KH - h.past && kw >= w.before && kw < KW - w.past;
      if (inside) sum -= 2 * popcount(load(reinterpret_cast<const u32*>(filter + at)));
    }
    for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
    // A window that is cut on both sides may have no tap left; the others never go below zero.
    const int rows = KH - h.before - h.past, columns = KW - w.before - w.past;
    if (rows > 0 && columns > 0) sum += rows * columns * CHANNELS;
    if (lane == 0) store(p.corr + static_cast<i64>(label) * COUT + n, sum);
  }
}

// One warp a window.
DEVICE void prepare_window(const Params& p, int m, int lane) {
  const Window window = window_of(m, p.rows);
  int count = 0;
  for (int at = 4 * lane; at < K_BYTES; at += 128) {
    const Chunk chunk = chunk_at(at);
    if (reads(window, chunk)) {
      const unsigned char* from = reinterpret_cast<const unsigned char*>(p.words) + window.base;
      count += popcount(load(reinterpret_cast<const u32*>(from + chunk.distance)));
    }
  }
  for (int mask = 16; mask > 0; mask >>= 1) count += shuffle_xor(count, mask);
  if (lane == 0) store(p.pa + m, count);
}

// Blocks of WARPS warps: first one warp for each filter, then one for each window if they are
// asked.
template <int WARPS>
struct Prepare {
  DEVICE static void run(const Params& p) {
    const int warp = block_index() * WARPS + thread_index() / 32, lane = thread_index() % 32;
    const int filters = (COUT + WARPS - 1) / WARPS * WARPS;
    if (warp < filters) {
      if (warp < COUT) prepare_filter(p, warp, lane);
    } else if (WINDOWS && warp - filters < p.rows) {
      prepare_window(p, warp - filters, lane);
    }
  }
};
