// What a block of a resident kernel prepares once: BN filters in shared memory, masks below them,
// the epilogue's values of their channels, and from these the table that the epilogue reads.
//
// Nothing is counted: the bits of the filters' taps that lie inside the image are products too, of
// the filters with the masks.
#pragma once
#include "epilogue.cuh"
#include "masks.cuh"

// Whether the epilogue is nothing but comparisons of the dot product.
HOST_DEVICE bool only_signs() { return OUT_TYPE == NONE && signs_by_table(); }

// Whether the real epilogue needs the integer dot product; else its table is of floats.
HOST_DEVICE bool integers() { return OUT_TYPE == INT32 || OUT_TYPE == INT16 || THRESHOLD; }

// The channels' values in shared memory, one line of BN a name. Of comparisons there are two lower
// bounds, in halves of the table's order: a bit is (dot >= FIRST) xor flip, and not dot >= SECOND.
// A channel without a lower bound flips; SECOND is looked at only if some channel of the tile has
// both.
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
  LINE_FLIP = LINE_SCALE,  // a word for 32 channels
  LINE_FIRST = LINE_LOW,
  LINE_SECOND = LINE_HIGH
};

// Dot products of a channel that give a 1; a channel that is not there has none.
struct Limits {
  int low, high;
};

template <int BN, int THREADS>
struct Filters {
  static constexpr int N = BN + MASKS;
  static constexpr int TILE = N * 128;  // bytes: 4 products of the filters
  static_assert(THREADS >= 256 && BN % 64 == 0 && BN <= 128);
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

  // Of a product: an addition of 64 bits, for which there is one instruction. Where compilers know
  // that the upper half is a constant they add the halves one by one.
  DEVICE u64 descriptor(int product) const {
    const u64 first = wide_descriptor(filters);
    const u32 high = static_cast<u32>(first >> 32) * unknown_one();
    return (static_cast<u64>(high) << 32 | static_cast<u32>(first)) + along(product);
  }

  // From the first product to another, in the 16 bytes of descriptors.
  HOST_DEVICE static int along(int product) { return product / 4 * (TILE / 16) + product % 4 * 2; }

  static constexpr u32 SECOND = (LINE_SECOND - LINE_FIRST) * BN * 4;  // from one bound to the other
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

  // Of units of 8 bytes, whose words lie 16 bytes apart: 4 threads a row. The first warpgroup has
  // the table to make, if it is alone with that.
  DEVICE void copy_units(const Params& p, int n0) const {
    const u32 first = BN == 64 ? 128 : 0, thread = thread_index() - first,
              each = (THREADS - first) / 4;
    const u32 t = thread_index() % 4;
    if (thread_index() < first) return;
#pragma unroll
    for (u32 turn = 0; turn < (BN + each - 1) / each; ++turn) {
      const u32 row = turn * each + thread / 4;
      if (BN % each && row >= BN) break;
      const u32 channel = n0 + channel_of(row), to = address(row, 2 * t);
      const bool there = COUT % BN == 0 || channel < COUT;
      // One address and constants; what is not real is not read.
      const unsigned char* const at = reinterpret_cast<const unsigned char*>(p.filters) + 8 * t +
                                      channel * static_cast<u64>(K_BYTES);
#pragma unroll 4
      for (int product = 0; product < products(); ++product) {
        const u32 place = product / 4 * TILE, piece = product % 4 * 32;
        const bool real = there && (4 * product + 3 < units() || 4 * product + t < units());
        copy_async<4>((to ^ piece) + place, at + 32 * product, real);
        copy_async<4>((to ^ (piece + 16)) + place, at + 32 * product + 4, real);
      }
    }
  }

  // Whether bulk copies bring the filters: in the order of memory, of whole words of channels.
  HOST_DEVICE static bool by_map() { return BOXES > 0 && CHUNK == 16 && COUT % 32 == 0; }

  // Starts to copy the masks of the first pass, which are constants, and the filters from n0 on
  // where a map brings them, by one thread. The map has the order of `channel_of`, and zeros past
  // the end of K and past the last channel.
  DEVICE void copy(const TensorMap& map, int n0, u32 barrier) const {
    const int tiles = filter_bytes() / TILE, rows = MASKS + (by_map() ? BN : 0);
    const u32* const masks = first_masks();
    barrier_arrive_expect(barrier, tiles * rows * 128);
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      const u32 to = filters + tile * TILE;
      if (by_map()) copy_bulk(to, map, tile * 128, 0, 0, 0, n0 / 32, barrier);
      copy_bulk(to + BN * 128, masks + tile * MASK_WORDS, MASK_WORDS * 4, barrier);
    }
  }

  // Those of any pass, made by all threads.
  DEVICE void store_masks(int pass) const {
    const int pieces = MASKS * 2 * products();
#pragma unroll 2
    for (int turn = 0; turn < (pieces + THREADS - 1) / THREADS; ++turn) {
      const u32 i = turn * THREADS + thread_index(), piece = i / MASKS, row = i % MASKS;
      if (i >= static_cast<u32>(pieces)) break;
      const Inside inside = Inside::of(mask_class(pass, row));
      u32 v[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) v[m] = mask_word(inside, piece, m);
      store_shared4(filters + piece / 8 * TILE + wide_offset(BN + row, piece % 8 * 16), v);
    }
  }

  // The first warpgroup that makes no part of the table prepares the channels' values: this thread
  // those of channel own(), if there is one.
  DEVICE static bool owning() { return thread_index() / 128 == BN / 64; }
  DEVICE static int own() { return thread_index() % 128; }
  DEVICE static bool owns() { return owning() && own() < BN; }

  // The thresholds of this thread's channel.
  DEVICE static Limits limits(const Params& p, int n0) {
    const int channel = n0 + own();
    if (!owns() || COUT % BN && channel >= COUT) return {MOST, MOST};
    if (!THRESHOLD) return {0, MOST};
    return {load_fresh(p.threshold + channel), load_fresh(p.threshold + COUT + channel)};
  }

  // Starts to copy the filters from n0 on, where no map brings them.
  DEVICE void fill(const Params& p, int n0) const {
    if (by_map()) return;
    if (CHUNK == 16) {
      copy<16>(p, n0);
    } else if (unit() == 8) {
      copy_units(p, n0);
    } else {
      copy<4>(p, n0);
    }
  }

  // Whether this thread's channel has two bounds.
  DEVICE bool store_limits(const Limits& limits) const {
    if (!owns()) return false;
    if (only_signs()) return store_bounds(limits, own());
    if (THRESHOLD) {
      store_shared(line(LINE_LOW, own()), limits.low);
      store_shared(line(LINE_HIGH, own()), limits.high);
    }
    return false;
  }

  // As what the table's entries of class 0 would be without bits. No dot product reaches `never`.
  DEVICE bool store_bounds(const Limits& limits, u32 i) const {
    const int most = CHANNELS * KH * KW, never = most + 1, start = most + (1 << 15);
    const int end = at_most(limits.high, most) + 1;
    int low = at_least(limits.low, -most);
    if (low >= end) low = never;
    const bool flip = low <= -most, both = !flip && low < never && end < never;
    const u32 to = line(LINE_FIRST, 0) + half_at(i / 32, i / 8 % 4, i % 8);
    store_shared_half(to, start - (flip ? end : low));
    if (THRESHOLD) {
      store_shared_half(to + SECOND, start - (both ? end : never));
      const u32 flips = ballot(flip);
      if (i % 32 == 0) store_shared(line(LINE_FLIP, i / 32), flips);
    }
    return both;
  }

  // A sum is -0.0 only of two that are: with +0.0 for it, its sign bit says whether it is below 0.
  // Once this thread's copies are there.
  DEVICE void positive_zero() const {
    if (!SIGN_SHIFT || !owns()) return;
    const u32 at = line(LINE_SIGN_SHIFT, own());
    store_shared(at, float_bits(add(float_value(load_shared(at)), 0.0f)));
  }

  DEVICE void value(int name, const float* from, int n0, int i) const {
    const bool inside = n0 + i < COUT;
    copy_async<4>(line(name, i), inside ? from + n0 + i : from, inside);
  }

  // Starts to copy the values of this thread's channel that are not in `Limits`.
  DEVICE void values(const Params& p, int n0) const {
    if (only_signs() || !owns()) return;
    const int i = own();
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
  HOST_DEVICE static u32 half_at(u32 q, u32 t, u32 k) {
    const u32 each = 256 / BN;  // of the values of k in 64 bytes
    return k / each * 64 + t * 16 + k % each * (BN / 16) + q / 2 * 4 + q % 2 * 2;
  }

  // By the warpgroups from the first on, 64 filters each: multiplies them with the masks of a pass,
  // and writes the table's lines of their classes, class 0 and the next 8, or 8 further ones.
  DEVICE void tables(int pass, bool both) const {
    const u32 thread = thread_index(), lane = thread % 32;
    const u32 group = BN > 64 ? uniform(thread / 128) : 0;
    int acc[MASKS / 8][4];
    const u64 first = wide_descriptor(filters), a = first + group * 512, b = first + BN * 8;
    wgmma_fence();
#pragma unroll
    for (int product = 0; product < products(); ++product) {
      // Products of one tap have the same masks.
      const int each = PIXEL % 32 ? 1 : PIXEL / 32, masks = product / each * each;
      wgmma_and<MASKS>(acc, a + along(product), b + along(masks), product > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    // Of class 0 and of this lane's two others: corr, less that of class 0 without bits.
    const Cuts cuts = cut_products(4 * pass + lane % 4);
    int corr[3][2];
    for (int h = 0; h < 2; ++h) {
      corr[0][h] = -2 * acc[0][2 * h];
      for (int i = 0; i < 2; ++i) corr[1 + i][h] = cuts.v[i] - 2 * acc[1][2 * h + i];
    }
    const int label = 8 * pass + 1 + lane % 4 * 2;
    if (only_signs()) {
      put_signs(0, pass, label, half_of(thread), corr);
      if (both) put_signs(1, pass, label, half_of(thread), corr);
    } else {
      put(pass, label, channel_of(thread / 32 * 16 + lane / 4), corr);
    }
  }

  // Of a thread's first row, lane / 4 of its warp's 16: as half_at says, from the thread's bits.
  // The second one, 8 on, is the next channel but one.
  DEVICE static u32 half_of(u32 thread) {
    if (BN == 64) return (thread & 32) * 2 + (thread & 24) * 2 + (thread & 4) + (thread & 64) / 32;
    return (thread & 32) * 4 + (thread & 28) * 2 + (thread & 192) / 32;
  }

  // Of the classes 0 (i is 0), of the first pass alone, `label` and the next.
  DEVICE static bool stored(int i, int pass, int label) {
    if (i == 0) return pass == 0;
    return 8 * pass + 9 <= border_classes() || label + i - 1 < border_classes();
  }

  DEVICE void put(int pass, int label, int channel, const int (&corr)[3][2]) const {
    const u32 to = table + channel * 4, others = to + label * (BN * 4);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!stored(i, pass, label)) continue;
      for (int h = 0; h < 2; ++h) {
        const int value = CHANNELS * KH * KW + corr[i][h];
        store_shared((i ? others + (i - 1) * BN * 4 : to) + 8 * h,
                     integers() ? value : float_bits(static_cast<float>(value)));
      }
    }
  }

  // Of one of the bounds.
  DEVICE void put_signs(int which, int pass, int label, int half, const int (&corr)[3][2]) const {
    const u32 from = line(LINE_FIRST, 0) + which * SECOND + half;
    const u32 to = table + line_at(0, which) + half, others = to + line_at(label, 0);
    u32 start[2];
    for (int h = 0; h < 2; ++h) start[h] = load_shared_half(from + half_at(0, 0, 2) * h);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (!stored(i, pass, label)) continue;
      for (int h = 0; h < 2; ++h) {
        store_shared_half((i ? others + line_at(i - 1, 0) : to) + half_at(0, 0, 2) * h,
                          start[h] + corr[i][h]);
      }
    }
  }
};
