// What a block of a resident kernel prepares once: BN filters in shared memory, rows of ones below
// them, the epilogue's values of their channels, and from these the table that the epilogue reads.
//
// Nothing is counted: the bits of the filters' taps that lie inside the image are products too, of
// the filters with a window for each border class that has ones in those taps.
#pragma once
#include "epilogue.cuh"

// Whether the epilogue is nothing but comparisons of the dot product.
HOST_DEVICE bool only_signs() {
  return OUT_TYPE == NONE && PACKED &&
         (THRESHOLD || !(CLAMP_MIN || CLAMP_MAX || SCALE || BIAS || RESIDUAL || SLOPE || SHIFT_IN ||
                         SHIFT_OUT || SIGN_SHIFT));
}

// Whether the real epilogue needs the integer dot product; else its table is of floats.
HOST_DEVICE bool integers() { return OUT_TYPE == INT32 || OUT_TYPE == INT16 || THRESHOLD; }

// The channels' values in shared memory, one line of BN a name. Of comparisons there are two lower
// bounds: a bit is (dot >= FIRST) xor flip, and not dot >= SECOND. A channel with only an upper
// bound flips; SECOND is looked at only if some channel of the tile has both.
enum Line {
  LINE_SCALE,
  LINE_BIAS,
  LINE_SHIFT_IN,
  LINE_SLOPE,
  LINE_SHIFT_OUT,
  LINE_SIGN_SHIFT,
  LINE_LOW,
  LINE_HIGH,
  LINES,
  LINE_FLIP = LINE_SCALE,
  LINE_BOTH = LINE_BIAS,  // a word for 32 channels
  LINE_FIRST = LINE_LOW,
  LINE_SECOND = LINE_HIGH
};

template <int BN, int THREADS>
struct Filters {
  static constexpr int N = BN + 16;
  static constexpr int TILE = N * 128;  // bytes: 4 products of the filters
  static_assert(THREADS >= 256 && THREADS >= BN && BN % 64 == 0);
  u32 filters, lines, table;

  HOST_DEVICE static int filter_bytes() { return (products() + 3) / 4 * TILE; }
  HOST_DEVICE static int line_bytes() { return LINES * BN * 4; }
  HOST_DEVICE static int table_bytes() {
    return border_classes() * BN * 4 * (!only_signs() ? 1 : THRESHOLD ? 4 : 2);
  }

  DEVICE u32 address(int row, int word) const {
    const Slot slot = slot_of(word);
    return filters + slot.product / 4 * TILE +
           wide_offset(row, slot.product % 4 * 32 + slot.word * 4);
  }

  DEVICE u64 descriptor(int product) const {
    return wide_descriptor(filters + product / 4 * TILE) + product % 4 * 2;  // in 16 bytes
  }

  DEVICE u32 line(int name, int channel) const { return lines + (name * BN + channel) * 4; }

  template <int SIZE>
  DEVICE void copy(const Params& p, int n0) const {
    const u32 pieces = products() * 32 / SIZE;  // of a row, filled up with zeros
    const unsigned char* const from = reinterpret_cast<const unsigned char*>(p.filters);
#pragma unroll 2
    for (u32 i = thread_index(); i < BN * pieces; i += THREADS) {
      const u32 row = i / pieces, byte = (i - row * pieces) * SIZE, channel = n0 + channel_of(row);
      const bool real = (COUT % BN == 0 || channel < COUT) && (K_BYTES % 32 == 0 || byte < K_BYTES);
      copy_async<SIZE>(address(row, byte / 4),
                       real ? from + static_cast<u64>(channel) * K_BYTES + byte : from, real);
    }
  }

  // Starts to copy the filters from n0 on, and stores the rest but for the table.
  DEVICE void fill(const Params& p, int n0) const {
    if (CHUNK == 16) {
      copy<16>(p, n0);
    } else {
      copy<4>(p, n0);
    }
    copy_async_commit();
#pragma unroll 1
    for (int i = thread_index(); i < 8 * 8 * products(); i += THREADS) {
      store_shared(address(BN + i % 8, i / 8), 4 * (i / 8) < K_BYTES ? ~0u : 0);
    }
    if (thread_index() >= BN) return;
    if (only_signs()) {
      bounds(p, n0, thread_index());
    } else {
      values(p, n0, thread_index());
    }
  }

  DEVICE void bounds(const Params& p, int n0, int i) const {
    const int channel = n0 + i;
    int low = 0, high = MOST;
    if (THRESHOLD && channel < COUT) {
      low = load(p.threshold + channel);
      high = load(p.threshold + COUT + channel);
    }
    const Bounds found = Bounds::of(low, high, channel < COUT);
    store_shared(line(LINE_FIRST, i), found.low);
    store_shared(line(LINE_SECOND, i), found.end);
    const u32 flips = ballot(found.flip), both = ballot(found.between);
    if (i % 32 == 0) {
      store_shared(line(LINE_FLIP, i / 32), flips);
      store_shared(line(LINE_BOTH, i / 32), both);
    }
  }

  // A sum is -0.0 only of two that are: with +0.0 for -0.0 its sign bit says whether it is below 0.
  DEVICE void value(int name, const float* from, int n0, int i) const {
    const float x = n0 + i < COUT ? load(from + n0 + i) : 0.0f;
    store_shared(line(name, i), float_bits(name == LINE_SIGN_SHIFT ? add(x, 0.0f) : x));
  }

  DEVICE void values(const Params& p, int n0, int i) const {
    if (SCALE) value(LINE_SCALE, p.scale, n0, i);
    if (BIAS) value(LINE_BIAS, p.bias, n0, i);
    if (SHIFT_IN) value(LINE_SHIFT_IN, p.shift_in, n0, i);
    if (SLOPE) value(LINE_SLOPE, p.slope, n0, i);
    if (SHIFT_OUT) value(LINE_SHIFT_OUT, p.shift_out, n0, i);
    if (SIGN_SHIFT) value(LINE_SIGN_SHIFT, p.sign_shift, n0, i);
    if (THRESHOLD && n0 + i < COUT) {
      store_shared(line(LINE_LOW, i), load(p.threshold + n0 + i));
      store_shared(line(LINE_HIGH, i), load(p.threshold + COUT + n0 + i));
    }
  }

  // Where the table has 4 channels from `channel` on. Of comparisons it has T, with
  //
  //   dot >= bound  is  T[which][class][popcount(window) odd] + popcount(window) / 2 - acc < 0,
  //   T = ceil((bound - corr + 2 odd) / 4) - 1
  //
  // and lane t of a quad reads channels 8 t on: two pieces, in turn so that rows of the tile with
  // odd and with even windows are in different banks. Else it has corr.
  HOST_DEVICE static int signs_at(int label, int odd, int half) {
    return (label * 2 + odd) * BN * 4 + (half ^ odd) * 64;
  }
  HOST_DEVICE static int second_table() { return border_classes() * 2 * BN * 4; }

  // Whether some channel has a lower and an upper bound.
  DEVICE bool any_both() const {
    u32 any = 0;
    for (int i = 0; i < BN / 32; ++i) any |= load_shared(line(LINE_BOTH, i));
    return any != 0;
  }

  // Which of the at most 32 taps lie inside the image, for windows of a border class.
  DEVICE static u32 taps_inside(int label) {
    const int across = axis_classes(LEFT, RIGHT, BOTH_W);
    const Cut h = axis_cut(label / across, TOP, BOTTOM, BOTH_H);
    const Cut w = axis_cut(label % across, LEFT, RIGHT, BOTH_W);
    u32 columns = 0, found = 0;
#pragma unroll
    for (int kw = 0; kw < KW; ++kw) {
      if (kw >= w.before && kw < KW - w.past) columns |= 1u << kw;
    }
#pragma unroll
    for (int kh = 0; kh < KH; ++kh) {
      if (kh >= h.before && kh < KH - h.past) found |= columns << kh * KW;
    }
    return found;
  }

  // By 8 warps, each BN / 8 channels, 16 classes at a time.
  DEVICE void tables(int warp, int lane) const {
    constexpr int STRIPS = BN / 64;
    const int t = lane % 4, classes = border_classes();
    if (warp >= 8) return;
    const bool second = THRESHOLD && any_both();
    for (int first = 0; first < classes; first += 16) {
      const int label[2] = {first + lane / 4, first + lane / 4 + 8};
      u32 taps[2];
      for (int h = 0; h < 2; ++h) taps[h] = label[h] < classes ? taps_inside(label[h]) : 0;
      int acc[STRIPS][4] = {};
#pragma unroll
      for (int product = 0; product < products(); ++product) {
        u32 a[2][2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int tap = word_at({product, t + 4 * k}) * 4 / PIXEL;
          for (int h = 0; h < 2; ++h) a[k][h] = tap < 32 && taps[h] >> tap & 1 ? ~0u : 0;
        }
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
          const u32 row = filters + product / 4 * TILE;
          const int f = (warp * STRIPS + s) * 8 + lane / 4, at = product % 4 * 32 + t * 4;
          mma_and(acc[s], a[0][0], a[0][1], a[1][0], a[1][1], load_shared(row + wide_offset(f, at)),
                  load_shared(row + wide_offset(f, at + 16)));
        }
      }
#pragma unroll
      for (int s = 0; s < STRIPS; ++s) {
        const int j = warp * STRIPS + s;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (label[i / 2] >= classes) continue;
          put(second, label[i / 2], j / 4, t, j % 4 * 2 + i % 2,
              CHANNELS * popcount(taps[i / 2]) - 2 * acc[s][i]);
        }
      }
    }
  }

  // Of channel 32 q + 8 t + k.
  DEVICE void put(bool second, int label, int q, int t, int k, int corr) const {
    const int channel = 32 * q + 8 * t + k;
    if (!only_signs()) {
      store_shared(table + (label * BN + channel) * 4,
                   integers() ? static_cast<u32>(corr) : float_bits(static_cast<float>(corr)));
      return;
    }
#pragma unroll
    for (int which = 0; which < (THRESHOLD ? 2 : 1); ++which) {
      if (which && !second) return;
      const int bound = load_shared(line(LINE_FIRST + which, channel));
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int at = which * second_table() + signs_at(label, odd, k / 4) + q * 128 + t * 16;
        store_shared(table + at + k % 4 * 4, table_entry(bound, corr, odd));
      }
    }
  }
};
