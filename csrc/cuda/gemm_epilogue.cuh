// From the counts of a tile of bulk_gemm.cuh to its outputs, with all that belongs to its rows and
// channels in shared memory. What is computed is epilogue.cuh's; here no load from global memory
// but the residual's is left.
//
// Signs that depend on the dot product alone, `dot >= low`, take two instructions an output. With
//
//   dot = 4 acc + corr - 2 pa     and     T[parity] = ceil((low - corr + 2 parity) / 4) - 1
//
// dot >= low is the sign bit of T[pa & 1] + (pa >> 1) - acc. Two such sums fit into one word where
// K is 32000 at most, so one addition serves two outputs, and a permutation that repeats sign bits
// collects four; with a longer K a funnel shift collects each. An upper bound is T of high + 1 with
// the bits flipped; a channel with both bounds has a second table, which is looked at only in tiles
// that have such a channel.
#pragma once
#include "epilogue.cuh"

HOST_DEVICE bool short_tables() { return 8 * K_BYTES <= 32000; }
HOST_DEVICE bool values_needed() { return OUT_TYPE != NONE || (PACKED && !signs_by_table()); }

// A slot of shared memory: pa of BM rows; vectors of BN channels, corr first; the tables of both
// bounds, each for both parities; masks of 32 channels that are flipped, and that have both bounds.
template <int BM, int BN>
struct TileSlot {
  // Rows of different parity read their tables in other banks: 64 bytes is what a quad reads.
  static constexpr int VECTOR = 4 * BN, TABLE = VECTOR + 64;
  static constexpr int VECTORS = 4 * BM, TABLES = VECTORS + 7 * VECTOR;
  static constexpr int FLIPS = TABLES + 4 * TABLE, BETWEEN = FLIPS + BN / 8;
  static constexpr int BYTES = BETWEEN + BN / 8;
  static constexpr int MASKS = BN / 32, EACH = (MASKS + 2) / 3;
  static_assert(BYTES % 16 == 0 && BN % 128 == 0, "");

  // Of two neighbouring fragments a lane has channels 2 t, 2 t + 1, 2 t + 8, 2 t + 9: these four
  // lie side by side, one 16-byte load.
  DEVICE static int place(int c) { return c / 16 * 16 + c % 8 / 2 * 4 + c % 16 / 8 * 2 + c % 2; }

  // Of short tables the halves of a word are channels c and c + BN / 4, the low one first; of the
  // words those of fragments 2 pair and the next lie side by side, as above.
  DEVICE static int half_place(int c) {
    const int quarter = c / (BN / 4), within = c % (BN / 4);
    const int block = (within / 32 * 2 + quarter / 2) * 2 + within / 16 % 2;
    return 2 * (16 * block + place(c % 16)) + quarter % 2;
  }

  // In a short table an entry is clamped to where the sum has its sign for every window, since
  // (pa >> 1) - acc is between -K / 2 - 1 and K / 2; 2^15 more keeps sums from borrowing.
  DEVICE static void put(u32 table, int c, int entry) {
    if (short_tables()) {
      const int most = 4 * K_BYTES + 2;
      const int within = entry < -most ? -most : entry > most ? most : entry;
      store_shared_half(table + 2 * half_place(c), within + 0x8000);
    } else {
      store_shared(table + 4 * place(c), entry);
    }
  }

  // By three warps. Every thread's loads are on their way before it uses one.
  DEVICE static void fill(const Params& p, u32 slot, int m0, int n0, int warp, int lane) {
    for (int i = 32 * warp + lane; i < BM; i += 96) {
      const bool there = m0 + i < p.rows;
      copy_async<4>(slot + 4 * i, there ? p.pa + m0 + i : p.pa, there);
    }
    int corr[EACH] = {}, low[EACH] = {}, high[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int c = 32 * (warp + 3 * i) + lane;
      const int n = n0 + c < COUT ? n0 + c : COUT - 1;
      if (c >= BN) break;
      if (values_needed()) vectors(p, slot + VECTORS + 4 * place(c), n);
      if (signs_by_table()) corr[i] = load_fresh(p.corr + n);
      high[i] = MOST;
      if (THRESHOLD) low[i] = load(p.threshold + n), high[i] = load(p.threshold + COUT + n);
    }
    copy_async_commit();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int q = warp + 3 * i, c = 32 * q + lane;
      if (!signs_by_table() || q >= MASKS) break;
      const Bounds bounds = Bounds::of(low[i], high[i], n0 + c < COUT);
      const u32 to = slot + TABLES;
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        put(to + parity * TABLE, c, table_entry(bounds.low, corr[i], parity));
        if (THRESHOLD) {
          put(to + (2 + parity) * TABLE, c, table_entry(bounds.end, corr[i], parity));
        }
      }
      if (!THRESHOLD) continue;
      const u32 flips = ballot(bounds.flip), between = ballot(bounds.between);
      if (lane == 0) {
        store_shared(slot + FLIPS + 4 * q, flips);
        store_shared(slot + BETWEEN + 4 * q, between);
      }
    }
    copy_async_wait<0>();
  }

  DEVICE static void vectors(const Params& p, u32 to, int n) {
    copy_async<4>(to, p.corr + n, true);
    if (SCALE) copy_async<4>(to + 1 * VECTOR, p.scale + n, true);
    if (BIAS) copy_async<4>(to + 2 * VECTOR, p.bias + n, true);
    if (SHIFT_IN) copy_async<4>(to + 3 * VECTOR, p.shift_in + n, true);
    if (SLOPE) copy_async<4>(to + 4 * VECTOR, p.slope + n, true);
    if (SHIFT_OUT) copy_async<4>(to + 5 * VECTOR, p.shift_out + n, true);
    if (SIGN_SHIFT) copy_async<4>(to + 6 * VECTOR, p.sign_shift + n, true);
  }

  // Vector v of the channels of fragments 2 pair and 2 pair + 1: two of each.
  DEVICE static void read(Pair<float> (&to)[2], u32 slot, int v, int pair, int t) {
    u32 bits[4];
    load_shared4(bits, slot + VECTORS + v * VECTOR + 64 * pair + 16 * t);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k / 2].v[k % 2] = float_value(bits[k]);
  }

  // Without corr, which is an integer.
  DEVICE static void read(Channels (&c)[2], u32 slot, int pair, int t) {
    Pair<float> v[2];
    if (SCALE) read(v, slot, 1, pair, t), c[0].scale = v[0], c[1].scale = v[1];
    if (BIAS) read(v, slot, 2, pair, t), c[0].bias = v[0], c[1].bias = v[1];
    if (SHIFT_IN) read(v, slot, 3, pair, t), c[0].shift_in = v[0], c[1].shift_in = v[1];
    if (SLOPE) read(v, slot, 4, pair, t), c[0].slope = v[0], c[1].slope = v[1];
    if (SHIFT_OUT) read(v, slot, 5, pair, t), c[0].shift_out = v[0], c[1].shift_out = v[1];
    if (SIGN_SHIFT) read(v, slot, 6, pair, t), c[0].sign_shift = v[0], c[1].sign_shift = v[1];
  }
};

// A 4 x 4 matrix of fields of 2 bits: bit 8 s + 2 j + i becomes 8 j + 2 s + i.
DEVICE u32 fields_transpose(u32 w) {
  u32 x = (w ^ (w >> 6)) & 0x00CC00CC;
  w ^= x ^ (x << 6);
  x = (w ^ (w >> 12)) & 0x0000F0F0;
  return w ^ x ^ (x << 12);
}

// As sign_words, by short tables.
template <int BN>
DEVICE void sign_words_short(u32 (&words)[BN / 128], const int (&acc)[BN / 8][4], int h, u32 table,
                             int half, int t) {
  const u32 halves = half * 0x10001;
#pragma unroll
  for (int g = 0; g < BN / 128; ++g) {
    u32 word = 0;
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      u32 v[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_shared4(v[i], table + 64 * (4 * g + 2 * i + odd) + 16 * t);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        u32 sums[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = (BN / 128 * 2 * i + g) * 2 + odd, next = at + BN / 64;  // a quarter on
          // Counts are below 2^16: their low halves are all of them.
          sums[i] = v[i][k] + halves -
                    permute(acc[2 * at + k / 2][2 * h + k % 2],
                            acc[2 * next + k / 2][2 * h + k % 2], 0x5410);
        }
        // Byte i for lane i; 2^15 more turned the signs around.
        word |= ~sign_bytes(sums[0], sums[1]) & (0x01010101u << (4 * odd + k));
      }
    }
    words[g] = fields_transpose(bytes_transpose(word, t));
  }
}

// The sign bits of half h of a fragment row. A lane gets whole words, BN / 128 neighbouring ones.
template <int BN>
DEVICE void sign_words(u32 (&words)[BN / 128], const int (&acc)[BN / 8][4], int h, u32 table,
                       int half, int one, int t) {
  if (short_tables()) {
    sign_words_short<BN>(words, acc, h, table, half, t);
    return;
  }
  const int minus = -one;
#pragma unroll
  for (int g = 0; g < BN / 128; ++g) {
    u32 word = 0;
#pragma unroll
    for (int pair = 7; pair >= 0; --pair) {
      // Fragments 2 pair and the next of 32 columns for lane pair / 2: byte pair / 2 goes there.
      const int at = (BN / 128 * (pair / 2) + g) * 2 + pair % 2;
      u32 v[4];
      load_shared4(v, table + 64 * at + 16 * t);
#pragma unroll
      for (int k = 3; k >= 0; --k) {
        const int count = acc[2 * at + k / 2][2 * h + k % 2], entry = v[k];
        // The shifts fill the ALU; every second sum is left to the multipliers, in two steps.
        word =
            funnel(word, k % 2 == 0 ? entry + half - count : count * minus + (entry * one + half));
      }
    }
    words[g] = fields_transpose(bytes_transpose(word, t));
  }
}

template <int BN>
DEVICE void store_words(const Params& p, int m, int n0, const u32 (&words)[BN / 128], int t) {
  const int each = BN / 128, width = (COUT + 31) / 32, first = n0 / 32 + each * t;
  u32* const to = p.packed + static_cast<i64>(m) * width + first;
  if (each == 2 && width % 2 == 0) {
    store2_if(m < p.rows && (COUT % BN == 0 || first < width), to, words[0], words[each - 1]);
    return;
  }
#pragma unroll
  for (int g = 0; g < each; ++g) {
    store_if(m < p.rows && (COUT % BN == 0 || first + g < width), to + g, words[g]);
  }
}

// Packed signs of rows m0 + row + 64 s + 0 .. 15 by the tables.
template <int BM, int BN, int STRIPS>
DEVICE void table_signs(const int (&acc)[STRIPS][BN / 8][4], const Params& p, u32 slot, int row,
                        int m0, int n0, int lane) {
  using Slot = TileSlot<BM, BN>;
  const int t = lane % 4;
  const int one = unknown_one();
  const bool between =
      THRESHOLD && any_lane(load_shared(slot + Slot::BETWEEN + 4 * (lane % Slot::MASKS)) != 0);
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 64 * s + lane / 4 + 8 * h;
      const int pa = load_shared(slot + 4 * r), half = pa >> 1;
      const u32 table = slot + Slot::TABLES + (pa & 1) * Slot::TABLE;
      u32 words[BN / 128];
      sign_words<BN>(words, acc[s], h, table, half, one, t);
      if (THRESHOLD) {
#pragma unroll
        for (int g = 0; g < BN / 128; ++g) {
          words[g] ^= load_shared(slot + Slot::FLIPS + 4 * (BN / 128 * t + g));
        }
      }
      if (between) {
        u32 past[BN / 128];
        sign_words<BN>(past, acc[s], h, table + 2 * Slot::TABLE, half, one, t);
#pragma unroll
        for (int g = 0; g < BN / 128; ++g) words[g] &= ~past[g];
      }
      store_words<BN>(p, m0 + r, n0, words, t);
    }
  }
}

// The rows of a tile that this lane has two channels of in every fragment: 64 s + 8 h from the
// first.
struct TileRows {
  int m, n0;   // the first row, and the tile's first column
  int left;    // rows from it to the end
  i64 start;   // its element of the output, and of the residual, in the first column
  bool whole;  // no tile reaches past COUT

  DEVICE static int past(int s, int h) { return 64 * s + 8 * h; }
  DEVICE bool inside(int s, int h) const { return past(s, h) < left; }
  DEVICE Row row(int s, int h) const {
    return {inside(s, h) ? m + past(s, h) : m + left - 1, 0, 0, inside(s, h)};
  }

  // Adding the constants last leaves one address for all rows.
  template <class T>
  DEVICE T* at(T* p, int s, int h, int lane_column, int column) const {
    return p + (start + lane_column) + (static_cast<i64>(past(s, h)) * COUT + column);
  }

  // The residual of two channels, as it lies in memory.
  DEVICE Pair<u32> residual(const Params& p, int s, int h, int lane_column, int column) const {
    const bool real = inside(s, h);
    Pair<u32> bits = {};
    if (!whole) {
      const Pair<float> values = residuals(p, row(s, h), n0 + lane_column + column);
      for (int i = 0; i < 2; ++i) bits.v[i] = float_bits(values.v[i]);
    } else if (RESIDUAL == FLOAT32) {
      load2_if(real, bits.v, at(static_cast<const u32*>(p.residual), s, h, lane_column, column));
    } else {
      const u16* const from = at(static_cast<const u16*>(p.residual), s, h, lane_column, column);
      bits.v[0] = load_if(real, reinterpret_cast<const u32*>(from));
    }
    return bits;
  }

  DEVICE float value(const Pair<u32>& bits, int i) const {
    if (RESIDUAL == FLOAT32 || !whole) return float_value(bits.v[i]);
    return residual_value(i == 0 ? bits.v[0] & 0xFFFF : bits.v[0] >> 16);
  }
};

// Two real outputs of 16 bits in one word.
DEVICE u32 short_pair(float a, float b) {
  return OUT_TYPE == FLOAT16 ? half_pair_bits(a, b) : bfloat_pair_bits(a, b);
}

// Real outputs, and the signs that depend on values in float32. The channels' values of two
// fragments are read once for all rows.
template <int BM, int BN, int STRIPS>
DEVICE void tile_values(const int (&acc)[STRIPS][BN / 8][4], const Params& p, u32 slot, int first,
                        int m0, int n0, int lane) {
  using Slot = TileSlot<BM, BN>;
  const bool SHORT = OUT_TYPE == FLOAT16 || OUT_TYPE == BFLOAT16;
  const bool LINES = SHORT && COUT % 8 == 0, WHOLE = COUT % BN == 0;
  const bool PAIRS = (OUT_TYPE == INT32 || OUT_TYPE == FLOAT32) && WHOLE;
  const int t = lane % 4, width = (COUT + 31) / 32;
  const int m = m0 + first + lane / 4;
  const TileRows rows = {m, n0, p.rows - m, static_cast<i64>(m) * COUT + n0, WHOLE};
  int bases[STRIPS][2];
  u32 kept[STRIPS][2] = {};
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      bases[s][h] =
          -2 * static_cast<int>(load_shared(slot + 4 * (first + lane / 4 + TileRows::past(s, h))));
    }
  }
#pragma unroll
  for (int q = 0; q < BN / 32; ++q) {
    u32 bits[STRIPS][2] = {}, real[STRIPS][2][4][2], line[STRIPS][2][4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      // Values are not read before those of the last two fragments are used: registers would not
      // do.
      if (SCALE || BIAS || SLOPE || RESIDUAL != NONE) sync_warp();
      Pair<u32> residual[STRIPS][2][2] = {};
      if (RESIDUAL != NONE) {
#pragma unroll
        for (int k = 0; k < 4 * STRIPS; ++k) {
          const int s = k / 4, h = k / 2 % 2, column = 32 * q + 16 * pair + 8 * (k % 2);
          residual[s][h][k % 2] = rows.residual(p, s, h, 2 * t, column);
        }
      }
      u32 corr[4];
      Channels c[2];
      load_shared4(corr, slot + Slot::VECTORS + 64 * (2 * q + pair) + 16 * t);
      Slot::read(c, slot, 2 * q + pair, t);
#pragma unroll
      for (int k = 0; k < 4 * STRIPS; ++k) {
        const int s = k / 4, h = k / 2 % 2, b = k % 2, j = 2 * pair + b;
        float y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int base = bases[s][h] + static_cast<int>(corr[2 * b + i]);
          const int dot = 4 * acc[s][4 * q + j][2 * h + i] + base;
          const int column = 8 * j + 2 * t + i;
          y[i] = finish(dot, c[b], i, rows.value(residual[s][h][b], i), p);
          if (PACKED && !signs_by_table() && sign_of(y[i], dot, c[b], i))
            bits[s][h] |= 1u << column;
          if (!LINES) real[s][h][j][i] = real_bits(y[i], dot);
        }
        if (LINES) line[s][h][j] = short_pair(y[0], y[1]);
        if (PAIRS) {
          u32* const to = rows.at(static_cast<u32*>(p.out), s, h, 2 * t, 32 * q + 8 * j);
          store2_if(rows.inside(s, h), to, real[s][h][j][0], real[s][h][j][1]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < 2 * STRIPS; ++k) {
      const int s = k / 2, h = k % 2;
      const bool inside = rows.inside(s, h);
      if (LINES) {
        // After the transposition a lane holds 8 neighbouring channels: one 16-byte store.
        u16* const to = rows.at(static_cast<u16*>(p.out), s, h, 8 * t, 32 * q);
        quad_transpose(line[s][h], t);
        store4_if(inside && (WHOLE || n0 + 32 * q + 8 * t < COUT), to, line[s][h]);
      } else if (OUT_TYPE != NONE && !PAIRS) {
        store_row(p, rows.row(s, h), n0 + 32 * q, real[s][h], t);
      }
      if (PACKED && !signs_by_table()) {
        u32 word = bits[s][h];
        word |= shuffle_xor(word, 1);
        word |= shuffle_xor(word, 2);
        if (!WHOLE) word &= channels_there(COUT - n0 - 32 * q);
        if (t == q % 4) kept[s][h] = word;
        // Four words of a row at once, one by each lane of the quad.
        const int at = n0 / 32 + q - 3 + t;
        u32* const to =
            p.packed + static_cast<i64>(m) * width + (TileRows::past(s, h) * width + at);
        if (q % 4 == 3) store_if(inside && (WHOLE || at < width), to, kept[s][h]);
      }
    }
  }
}

template <int BM, int BN, int STRIPS>
DEVICE void finish_tile(const int (&acc)[STRIPS][BN / 8][4], const Params& p, u32 slot, int row,
                        int m0, int n0, int lane) {
  if (values_needed()) tile_values<BM, BN, STRIPS>(acc, p, slot, row, m0, n0, lane);
  if (signs_by_table()) table_signs<BM, BN, STRIPS>(acc, p, slot, row, m0, n0, lane);
}
