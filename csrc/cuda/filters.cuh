// What a block of a resident kernel prepares once: BN filters in shared memory, rows of ones below
// them, the epilogue's values of their channels, and from these the table that the epilogue reads.
//
// Nothing is counted: the bits of the filters' taps that lie inside the image are products too, of
// the filters with a window for each border class that has ones in those taps.
#pragma once
#include "epilogue.cuh"

// Whether the epilogue is nothing but comparisons of the dot product.
HOST_DEVICE bool only_signs() { return OUT_TYPE == NONE && signs_by_table(); }

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
    return border_classes() * BN * (!only_signs() ? 4 : THRESHOLD ? 4 : 2);
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
    const int channel = n0 + thread_index();
    const bool mine = thread_index() < BN, inside = mine && channel < COUT;
    int low = 0, high = MOST;
    if (THRESHOLD && inside) {  // first, for they take the longest
      low = load_fresh(p.threshold + channel);
      high = load_fresh(p.threshold + COUT + channel);
    }
    if (!only_signs() && mine) values(p, n0, thread_index());
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
    if (!mine) return;
    if (only_signs()) {
      bounds(Bounds::of(low, high, inside), thread_index());
    } else if (THRESHOLD) {
      store_shared(line(LINE_LOW, thread_index()), low);
      store_shared(line(LINE_HIGH, thread_index()), high);
    }
  }

  DEVICE void bounds(const Bounds& found, int i) const {
    const int never = CHANNELS * KH * KW + 1;
    store_shared(line(LINE_FIRST, i), found.low < never ? found.low : never);
    store_shared(line(LINE_SECOND, i), found.end < never ? found.end : never);
    const u32 flips = ballot(found.flip), both = ballot(found.between);
    if (i % 32 == 0) {
      store_shared(line(LINE_FLIP, i / 32), flips);
      store_shared(line(LINE_BOTH, i / 32), both);
    }
  }

  DEVICE void value(int name, const float* from, int n0, int i) const {
    const bool inside = n0 + i < COUT;
    copy_async<4>(line(name, i), inside ? from + n0 + i : from, inside);
  }

  DEVICE void values(const Params& p, int n0, int i) const {
    if (SCALE) value(LINE_SCALE, p.scale, n0, i);
    if (BIAS) value(LINE_BIAS, p.bias, n0, i);
    if (SHIFT_IN) value(LINE_SHIFT_IN, p.shift_in, n0, i);
    if (SLOPE) value(LINE_SLOPE, p.slope, n0, i);
    if (SHIFT_OUT) value(LINE_SHIFT_OUT, p.shift_out, n0, i);
    if (SIGN_SHIFT) value(LINE_SIGN_SHIFT, p.sign_shift, n0, i);
  }

  // The table has corr, of border class and channel. Of comparisons it has corr - bound + 2^15 in
  // 16 bits, of two bounds: `which` of them. With them in the halves of a word
  //
  //   word - 2 popcount(window) + 4 acc
  //
  // has dot - bound + 2^15 in each, which lies between 0 and 2^16, so nothing is carried from one
  // to the other, and the first bit of a half says whether dot >= bound. The words of lane t of a
  // quad are its channels 32 q + 8 t + k, those of q and q + 1 in one, by k and then q.
  HOST_DEVICE static int line_at(int label, int which) {
    return (which * border_classes() + label) * BN * 2;
  }
  HOST_DEVICE static int half_at(int q, int t, int k) {
    const int word = k * (BN / 64) + q / 2;
    return word / 4 * 64 + t * 16 + word % 4 * 4 + q % 2 * 2;
  }

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
    if (SIGN_SHIFT && warp * 32 < BN) {
      // A sum is -0.0 only of two that are: with +0.0 for it, its sign bit says whether it is below
      // 0.
      const u32 at = line(LINE_SIGN_SHIFT, warp * 32 + lane);
      store_shared(at, float_bits(add(float_value(load_shared(at)), 0.0f)));
    }
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
      store_shared_half(table + line_at(label, which) + half_at(q, t, k), corr - bound + (1 << 15));
    }
  }
};
