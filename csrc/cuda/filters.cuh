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

// Dot products of a channel that give a 1; a channel that is not there has no ones.
struct Limits {
  int low, high;
  bool there;
};

HOST_DEVICE int at_least(int x, int least) { return x < least ? least : x; }
HOST_DEVICE int at_most(int x, int most) { return x > most ? most : x; }

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

  // Of a product: an addition of 64 bits, for which there is one instruction.
  DEVICE u64 descriptor(int product) const {
    return wide_descriptor(filters) + (product / 4 * (TILE / 16) + product % 4 * 2);
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

  // Of units of 8 bytes, whose words lie 16 bytes apart.
  DEVICE void copy_units(const Params& p, int n0) const {
    const u32 each = products() * 4;  // of a row, filled up with zeros
    const unsigned char* const from = reinterpret_cast<const unsigned char*>(p.filters);
#pragma unroll 2
    for (u32 turn = 0; turn < (BN * each + THREADS - 1) / THREADS; ++turn) {
      const u32 i = turn * THREADS + thread_index();
      if (BN * each % THREADS && i >= BN * each) break;
      const u32 row = i / each, unit = i - row * each, channel = n0 + channel_of(row);
      const bool real = (COUT % BN == 0 || channel < COUT) && (K_BYTES % 32 == 0 || unit < units());
      const unsigned char* const at =
          from + (real ? channel * static_cast<u64>(K_BYTES) + unit * 8 : 0);
      const u32 to = address(row, 2 * unit);
      copy_async<4>(to, at, real);
      copy_async<4>(to ^ 16, at + 4, real);
    }
  }

  // Whether bulk copies bring the filters: in the order of memory, of whole words of channels.
  HOST_DEVICE static bool by_map() { return BOXES > 0 && CHUNK == 16 && COUT % 32 == 0; }

  // Starts to copy the filters from n0 on, by one thread. The map has the order of `channel_of`,
  // and zeros past the end of K and past the last channel.
  DEVICE void copy(const TensorMap& map, int n0, u32 barrier) const {
    const int tiles = filter_bytes() / TILE;
    barrier_arrive_expect(barrier, tiles * BN * 128);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      copy_bulk(filters + tile * TILE, map, tile * 128, 0, 0, 0, n0 / 32, barrier);
    }
  }

  // The rows of ones, as far as K reaches, and zeros to the end of its last product.
  DEVICE void ones() const {
    constexpr int ROWS = 8;
    const int pieces = ROWS * 2 * products();
#pragma unroll
    for (int turn = 0; turn < (pieces + THREADS - 1) / THREADS; ++turn) {
      const u32 i = turn * THREADS + thread_index(), piece = i / ROWS;
      if (i >= static_cast<u32>(pieces)) break;
      u32 v[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) v[m] = inside_k(piece, m) ? ~0u : 0;
      store_shared4(filters + piece / 8 * TILE + wide_offset(BN + i % ROWS, piece % 8 * 16), v);
    }
  }

  // Of word m of 16 bytes of an operand.
  DEVICE static bool inside_k(int piece, int m) {
    if (K_BYTES % 16 == 0 && unit() != 8) return 16 * piece < K_BYTES;
    return 4 * word_at({piece / 2, piece % 2 * 4 + m}) < K_BYTES;
  }

  // Starts to copy what no map brings of the filters from n0 on and of their channels' values; the
  // thresholds of this thread's channel.
  DEVICE Limits fill(const Params& p, int n0) const {
    const int channel = n0 + thread_index();
    const bool mine = thread_index() < BN;
    Limits limits = {0, MOST, mine && channel < COUT};
    if (THRESHOLD && limits.there) {  // first, for they take the longest
      limits.low = load_fresh(p.threshold + channel);
      limits.high = load_fresh(p.threshold + COUT + channel);
    }
    if (!only_signs() && mine) values(p, n0, thread_index());
    if (!by_map()) {
      if (CHUNK == 16) {
        copy<16>(p, n0);
      } else if (unit() == 8) {
        copy_units(p, n0);
      } else {
        copy<4>(p, n0);
      }
    }
    copy_async_commit();
    return limits;
  }

  DEVICE void store_limits(const Limits& limits) const {
    if (thread_index() >= BN) return;
    if (only_signs()) {
      bounds(limits, thread_index());
    } else if (THRESHOLD) {
      store_shared(line(LINE_LOW, thread_index()), limits.low);
      store_shared(line(LINE_HIGH, thread_index()), limits.high);
    }
  }

  // As 2^15 - bound, with which the table's entries begin. No dot product reaches `never`.
  DEVICE void bounds(const Limits& limits, int i) const {
    const int least = -CHANNELS * KH * KW, never = 1 - least;
    const int low = at_most(at_least(limits.low, least), never);
    const int end = at_most(at_least(limits.high, least - 1), never - 1) + 1;
    const bool some = limits.there && low < end;
    const bool below = low > least, above = end < never;
    const bool flip = some && above && !below, both = some && above && below;
    store_shared(line(LINE_FIRST, i), (1 << 15) - (!some ? never : flip ? end : low));
    store_shared(line(LINE_SECOND, i), (1 << 15) - (both ? end : never));
    const u32 flips = ballot(flip), boths = ballot(both);
    if (i % 32 == 0) {
      store_shared(line(LINE_FLIP, i / 32), flips);
      store_shared(line(LINE_BOTH, i / 32), boths);
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

  // Bits below `n`, which is at most 32.
  HOST_DEVICE static u32 bits_below(int n) { return n < 32 ? (1u << n) - 1 : ~0u; }
  HOST_DEVICE static u32 bits_between(int first, int last) {
    return bits_below(last) & ~bits_below(first);
  }

  // Of taps, a bit each, those in rows or columns that are not cut off.
  HOST_DEVICE static u32 rows_inside(Cut h) {
    return bits_between(h.before * KW, (KH - h.past) * KW);
  }
  HOST_DEVICE static u32 columns_inside(Cut w) {
    u32 found = 0;
#pragma unroll
    for (int kh = 0; kh < KH; ++kh) found |= bits_between(w.before, KW - w.past) << kh * KW;
    return found;
  }

  // Which of the at most 32 taps lie inside the image, for windows of a border class. Few cuts of
  // an axis are constants to choose from.
  DEVICE static u32 taps_inside(int label) {
    constexpr int FEW = 4;
    const int across = axis_classes(LEFT, RIGHT, BOTH_W), down = border_classes() / across;
    const int h = label / across, w = label - h * across;
    u32 rows = rows_inside(axis_cut(down > FEW ? h : 0, TOP, BOTTOM, BOTH_H));
    u32 columns = columns_inside(axis_cut(across > FEW ? w : 0, LEFT, RIGHT, BOTH_W));
#pragma unroll
    for (int i = 1; i < FEW; ++i) {
      if (i < down && down <= FEW && h == i) rows = rows_inside(axis_cut(i, TOP, BOTTOM, BOTH_H));
      if (i < across && across <= FEW && w == i) {
        columns = columns_inside(axis_cut(i, LEFT, RIGHT, BOTH_W));
      }
    }
    return rows & columns;
  }

  // The table's products take 64 bytes of a filter at once, 16 a lane. What the taps of a lane's
  // words are late by, against lane 0, is shifted out first, where that is the same for all words;
  // the rest is known to the compiler.
  DEVICE static u32 for_lane(u32 inside, int t) {
    return PIXEL == 32   ? inside >> t / 2
           : PIXEL == 16 ? inside >> t
           : PIXEL == 8  ? inside >> t / 2 * 4
                         : inside;
  }
  DEVICE static u32 tap_inside(u32 inside, int chunk, int t, int m) {
    const int late = PIXEL == 32 || PIXEL == 16 || PIXEL == 8 || PIXEL % 64 == 0 ? 0 : t;
    const int tap = word_at({2 * chunk + late / 2, late % 2 * 4 + m}) * 4 / PIXEL;
    if (tap >= KH * KW) return 0;
    return static_cast<u32>(static_cast<int>(inside << (31 - tap)) >> 31);
  }

  // By BN / 16 warps, 16 classes at a time. A warp has 8 channels of both halves of the table's
  // words, so operands 8 j on of the q-th and the next 32. Of a product both operands may have K in
  // any order: a lane takes 16 bytes of a filter for two products.
  DEVICE void tables(int warp, int lane) const {
    const int t = lane % 4, g = lane / 4, classes = border_classes();
    if (SIGN_SHIFT && warp * 32 < BN) {
      // A sum is -0.0 only of two that are: with +0.0 for it, its sign bit says whether it is below
      // 0.
      const u32 at = line(LINE_SIGN_SHIFT, warp * 32 + lane);
      store_shared(at, float_bits(add(float_value(load_shared(at)), 0.0f)));
    }
    if (warp >= BN / 16) return;
    const bool second = THRESHOLD && only_signs() && any_both();
    const int q = warp / 4 * 2, j = warp % 4;
    const u32 even = filters + (32 * q + 8 * j) * 128 + wide_offset(g, t * 16), odd = even ^ 64;
    // Of at most 9 classes the rows from 8 on have the first one alone, whose taps are all of them.
    const bool few = classes <= 9;
    for (int first = 0; first < classes; first += 16) {
      const int label[2] = {first + g + few, few ? 0 : first + 8 + g};
      const u32 taps[2] = {taps_inside(label[0]),
                           few ? bits_below(KH * KW) : taps_inside(label[1])};
      u32 shifted[2];
      for (int h = 0; h < 2; ++h) shifted[h] = for_lane(taps[h], t);
      int acc[2][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < (products() + 1) / 2; ++chunk) {
        u32 a[4][2];
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          for (int h = 0; h < 2; ++h) {
            const bool all = h && few && 64 * (chunk + 1) <= K_BYTES;
            a[m][h] = all ? ~0u : tap_inside(shifted[h], chunk, t, m);
          }
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          u32 b[4];
          load_shared4(b, (chunk % 2 ? odd : even) + chunk / 2 * TILE + s * 4096);
          mma_and(acc[s], a[0][0], a[0][1], a[1][0], a[1][1], b[0], b[1]);
          mma_and(acc[s], a[2][0], a[2][1], a[3][0], a[3][1], b[2], b[3]);
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int all = CHANNELS * popcount(taps[h]);
        if (few && h ? g > 0 : label[h] >= classes) continue;
        if (only_signs()) {
          put_pairs(second, label[h], q, t, j, all, acc[0][2 * h], acc[0][2 * h + 1], acc[1][2 * h],
                    acc[1][2 * h + 1]);
        } else {
          for (int s = 0; s < 2; ++s) {
            store_shared2(table + (label[h] * BN + 32 * (q + s) + 8 * t + 2 * j) * 4,
                          entry(all - 2 * acc[s][2 * h]), entry(all - 2 * acc[s][2 * h + 1]));
          }
        }
      }
    }
  }

  DEVICE static u32 entry(int corr) {
    return integers() ? static_cast<u32>(corr) : float_bits(static_cast<float>(corr));
  }

  // Of channels 32 q + 8 t + 2 j and the next, and of those 32 on, whose bits inside are a, b, c,
  // d.
  DEVICE void put_pairs(bool second, int label, int q, int t, int j, int all, int a, int b, int c,
                        int d) const {
    const u32 both = all * 0x10001u;
#pragma unroll
    for (int which = 0; which < (THRESHOLD ? 2 : 1); ++which) {
      if (which && !second) return;
      u32 low[2], high[2];
      load_shared2(low, line(LINE_FIRST + which, 32 * q + 8 * t + 2 * j));
      load_shared2(high, line(LINE_FIRST + which, 32 * q + 8 * t + 2 * j + 32));
      const u32 to = table + line_at(label, which) + half_at(q, t, 2 * j);
      store_shared(to, low[0] + both - 2 * a + (high[0] - 2 * c) * 0x10000u);
      store_shared(to + half_at(0, 0, 1), low[1] + both - 2 * b + (high[1] - 2 * d) * 0x10000u);
    }
  }
};
