// Packed signs of a resident kernel's tile by comparisons with its table: an addition and a funnel
// shift an output. See Filters for the table and the order of the channels.
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
      if (rows[h].m < p.rows && (COUT % BN == 0 || at < words)) {
        store(p.packed + static_cast<i64>(rows[h].m) * words + at, bits[h]);
      }
    }
  } else {
    const int h = t / (BN / 32), at = n0 / 32 + t % (BN / 32), m = h ? rows[1].m : rows[0].m;
    if (h < 2 && m < p.rows && (COUT % BN == 0 || at < words)) {
      store(p.packed + static_cast<i64>(m) * words + at, bits[0]);
    }
  }
}

// Transposes them before, so that a lane has whole words: of 32 channels t of both rows, or of row
// t / (BN / 32).
template <int BN>
DEVICE void whole_words(u32 (&bits)[2], int t) {
  bits[0] = bytes_transpose(bits[0], t);
  if (BN == 128) bits[1] = bytes_transpose(bits[1], t);
}

template <int BN, int THREADS, int COLUMNS>
DEVICE void signs(const int (&acc)[COLUMNS][4], const Filters<BN, THREADS>& filters, bool both,
                  const Params& p, const TileRow (&rows)[2], int n0, int lane) {
  using F = Filters<BN, THREADS>;
  const int t = lane % 4;
  u32 bits[2] = {}, second[2] = {};
#pragma unroll
  for (int h = 1; h >= 0; --h) {
    const int ones = acc[BN / 8][2 * h], odd = ones & 1, half = ones >> 1;
    const u32 table = filters.table + t * 16;
    const u32 at[2] = {table + F::signs_at(rows[h].label, odd, 0),
                       table + F::signs_at(rows[h].label, odd, 1)};
    const int to = BN == 128 ? h : 0;
    auto compare = [&](u32& word, int offset) {
#pragma unroll
      for (int q = BN / 32 - 1; q >= 0; --q) {
#pragma unroll
        for (int k = 1; k >= 0; --k) {
          u32 v[4];
          load_shared4(v, at[k] + offset + q * 128);
#pragma unroll
          for (int i = 3; i >= 0; --i) {
            word = funnel(word, v[i] + half - acc[4 * q + 2 * k + i / 2][2 * h + i % 2]);
          }
        }
      }
    };
    compare(bits[to], 0);
    if (THRESHOLD && both) compare(second[to], F::second_table());
  }
  whole_words<BN>(bits, t);
  if (THRESHOLD) {
    const u32 flip = load_shared(filters.line(LINE_FLIP, t % (BN / 32)));
    bits[0] ^= flip, bits[1] ^= flip;
    if (both) {
      whole_words<BN>(second, t);
      bits[0] &= ~second[0], bits[1] &= ~second[1];
    }
  }
  store_signs<BN>(bits, p, rows, n0, t);
}
