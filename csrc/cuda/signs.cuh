// Packed signs of a resident kernel's tile by comparisons with its table, two in a register: two
// multiply-adds, half an addition and half a logical operation an output. See Filters for the table
// and the order of the channels.
#pragma once
#include "filters.cuh"

// A row of the tile, of which a lane has two.
struct TileRow {
  int m, label;
};

// Stores the bits of a lane's 8 channels in each 32 of BN, for both rows: bytes [row][32 channels]
// of `bits`, or a word a row where BN is 128.
template <int BN>
DEVICE void store_signs(const u32 (&bits)[2], const Params& p, const TileRow (&rows)[2], int n0,
                        int t) {
  const int words = (COUT + 31) / 32;
  if (BN == 128) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = n0 / 32 + t;
      store_if(rows[h].m < p.rows && (COUT % BN == 0 || at < words),
               p.packed + static_cast<i64>(rows[0].m) * words + at + 8 * h * words, bits[h]);
    }
  } else {
    const int h = t / (BN / 32), at = n0 / 32 + t % (BN / 32), m = rows[0].m + 8 * h;
    store_if(m < p.rows && (COUT % BN == 0 || at < words),
             p.packed + static_cast<i64>(m) * words + at, bits[0]);
  }
}

// Transposes them before, so that a lane has whole words: of 32 channels t of both rows, or of row
// t / (BN / 32).
template <int BN>
DEVICE void whole_words(u32 (&bits)[2], int t) {
  bits[0] = bytes_transpose(bits[0], t);
  if (BN == 128) bits[1] = bytes_transpose(bits[1], t);
}

// The table's words for both rows of a lane.
template <int BN>
struct Comparisons {
  static constexpr int EACH = BN / 8;
  u32 v[2][EACH];

  template <int THREADS>
  DEVICE void fetch(const Filters<BN, THREADS>& filters, int which, const TileRow (&rows)[2],
                    int t) {
    using F = Filters<BN, THREADS>;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Hidden, so that what follows is an offset of the load and not a sum of its own.
      const u32 from = forget(filters.table + F::line_at(rows[h].label, which) + t * 16);
#pragma unroll
      for (int i = 0; i < EACH; i += 4) {
        load_shared4(reinterpret_cast<u32(&)[4]>(v[h][i]), from + i * 16);
      }
    }
  }

  // Bytes [row][32 channels] of bits [k], or a word a row where BN is 128.
  template <int COLUMNS>
  DEVICE void compare(u32 (&bits)[2], const int (&acc)[COLUMNS][4]) const {
    u32 minus[2];
    for (int h = 0; h < 2; ++h) minus[h] = acc[BN / 8][2 * h] * 0x20002u;
    bits[0] = bits[1] = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      u32 difference[2][BN / 64];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < BN / 64; ++w) {
          const int at = 8 * w + k / 2, i = 2 * h + k % 2;
          difference[h][w] = acc[at + 4][i] * (4u << 16) +
                             (acc[at][i] * 4u + (v[h][k * (BN / 64) + w] - minus[h]));
        }
      }
      if (BN == 128) {
        for (int h = 0; h < 2; ++h) {
          bits[h] |= sign_bytes(difference[h][0], difference[h][BN / 64 - 1]) & 0x01010101u << k;
        }
      } else {
        bits[0] |= sign_bytes(difference[0][0], difference[1][0]) & 0x01010101u << k;
      }
    }
  }
};

template <int BN, int THREADS, int COLUMNS>
DEVICE void signs(const int (&acc)[COLUMNS][4], const Filters<BN, THREADS>& filters,
                  Comparisons<BN>& comparisons, bool both, const Params& p,
                  const TileRow (&rows)[2], int n0, int lane) {
  const int t = lane % 4;
  u32 bits[2];
  comparisons.compare(bits, acc);
  if (THRESHOLD) {
    if (both) {
      u32 second[2];
      comparisons.fetch(filters, 1, rows, t);
      comparisons.compare(second, acc);
      // Channels that flip have no second bound.
      bits[0] &= ~second[0], bits[1] &= ~second[1];
    }
    whole_words<BN>(bits, t);
    const u32 flip = load_shared(filters.line(LINE_FLIP, t % (BN / 32)));
    bits[0] ^= flip, bits[1] ^= flip;
  } else {
    whole_words<BN>(bits, t);
  }
  store_signs<BN>(bits, p, rows, n0, t);
}
