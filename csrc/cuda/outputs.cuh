// Real values and packed signs of a resident kernel's tile: the epilogue of docs/architecture.md in
// float32 with one rounding a step, and the dot products themselves with their sums.
//
// A lane has 8 neighbouring channels in every 32: residuals and outputs of 16 bits are one access.
#pragma once
#include "epilogue.cuh"
#include "signs.cuh"

HOST_DEVICE bool wide() { return NHWC && COUT % 8 == 0; }
HOST_DEVICE bool short_residual() { return RESIDUAL == FLOAT16 || RESIDUAL == BFLOAT16; }
HOST_DEVICE bool short_output() {
  return OUT_TYPE == FLOAT16 || OUT_TYPE == BFLOAT16 || OUT_TYPE == INT16;
}

// Where a lane's outputs and residuals are that it accesses 8 channels at once: one address and
// constants, and nothing branches.
template <int BN>
struct Place {
  i64 first;  // element of its first row and channel
  int channel, t;

  DEVICE static Place of(int m, int n0, int t) {
    return {static_cast<i64>(m) * COUT + n0 + 8 * t, n0 + 8 * t, t};
  }

  // Channels from 32 q on of row 16 s + 8 h.
  template <class T>
  DEVICE T* in(T* from, int s, int h, int q) const {
    return from + first + ((16 * s + 8 * h) * COUT + 32 * q);
  }
  DEVICE bool there(const Params& p, int m, int q) const {
    return m < p.rows && (COUT % BN == 0 || channel + 32 * q < COUT);
  }
};

// The residuals of a lane, of which 16-bit ones can be on their way while the products run.
template <int BN, int STRIPS>
struct Residuals {
  u32 v[STRIPS][2][BN / 32][4];

  DEVICE void fetch(const Params& p, const TileRow (&rows)[STRIPS][2], int n0, int t) {
    if (!short_residual() || !wide()) return;
    const auto place = Place<BN>::of(rows[0][0].m, n0, t);
    const u16* const from = static_cast<const u16*>(p.residual);
#pragma unroll
    for (int i = 0; i < 2 * STRIPS; ++i) {
      const int s = i / 2, h = i % 2;
#pragma unroll
      for (int q = 0; q < BN / 32; ++q) {
        load4_if(place.there(p, rows[s][h].m, q), v[s][h][q], place.in(from, s, h, q));
      }
    }
  }

  // EACH of 8 channels of a row, from number `first` of them on.
  template <int EACH>
  DEVICE void get(float (&r)[EACH], const Params& p, const Place<BN>& place, int s, int h, int q,
                  int first, int m) const {
    if (short_residual() && wide()) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const u32 pair = v[s][h][q][(first + k) / 2];
        r[k] = residual_value(k % 2 ? pair >> 16 : pair & 0xFFFF);
      }
    } else if (RESIDUAL != NONE && wide()) {
      const u32* const from = place.in(static_cast<const u32*>(p.residual), s, h, q) + first;
      // Branches keep compilers from loading those of all rows at once, into registers not there.
      if (!place.there(p, m, q)) return;
#pragma unroll
      for (int k = 0; k < EACH; k += 4) {
        u32 x[4];
        load4(x, from + k);
        for (int i = 0; i < 4; ++i) r[k + i] = float_value(x[i]);
      }
    } else if (RESIDUAL != NONE) {
#pragma unroll
      for (int k = 0; k < EACH; ++k) {
        const int channel = place.channel + 32 * q + first + k;
        const bool inside = m < p.rows && channel < COUT;
        r[k] = inside ? residual_value(residual_at(p, element(m, channel))) : 0.0f;
      }
    }
  }
};

// Stores EACH of 8 channels of a row, from number `first` of them on; of 16-bit types, pairs in the
// first four of `line`, all at once when the last of them, number 0, is there.
template <int EACH, int BN>
DEVICE void store_line(const Params& p, const u32 (&line)[8], const Place<BN>& place, int s, int h,
                       int q, int first, int m) {
  if (wide() && short_output()) {
    if (first > 0) return;
    store4_if(place.there(p, m, q), place.in(static_cast<u16*>(p.out), s, h, q),
              {line[0], line[1], line[2], line[3]});
  } else if (wide()) {
    u32* const to = place.in(static_cast<u32*>(p.out), s, h, q);
#pragma unroll
    for (int k = first; k < first + EACH; k += 4) {
      store4_if(place.there(p, m, q), to + k, {line[k], line[k + 1], line[k + 2], line[k + 3]});
    }
  } else if (m < p.rows) {
#pragma unroll
    for (int k = first; k < first + EACH; ++k) {
      const int channel = place.channel + 32 * q + k;
      if (channel >= COUT) break;
      const i64 at = element(m, channel);
      if (short_output()) {
        store(static_cast<u16*>(p.out) + at, static_cast<u16>(line[k / 2] >> k % 2 * 16));
      } else {
        store(static_cast<u32*>(p.out) + at, line[k]);
      }
    }
  }
}

// Values of a line in shared memory from an address on.
template <int EACH>
DEVICE void load_line(u32 (&v)[EACH], u32 address) {
#pragma unroll
  for (int i = 0; i < EACH; i += 4) {
    load_shared4(reinterpret_cast<u32(&)[4]>(v[i]), address + 4 * i);
  }
}

// What a lane has seen of its channels, BN / 4 of them, 8 in every 32: sums of the dot products, or
// of their positive parts, and of their squares.
template <int BN, int STRIPS>
struct Moments {
  int sums[BN / 4] = {};
  u32 squares[BN / 4] = {};

  // Tiles after which the squares of the rows that the lanes of a column have, 16 a strip, might
  // overflow.
  HOST_DEVICE static int most_tiles() {
    const u64 products = CHANNELS * KH * KW,
              most = 0xFFFFFFFFull / (16 * STRIPS * products * products);
    return most < 1 << 20 ? static_cast<int>(most) : 1 << 20;
  }

  DEVICE void see(int i, int dot) {
    if (MOMENTS == 2) dot = dot > 0 ? dot : 0;
    sums[i] += dot;
    squares[i] += dot * dot;
  }

  // Adds them up over the lanes of a column, then to this warp's `totals`, [2][BN] of 64 bits.
  DEVICE void flush(u32 totals, int lane) {
#pragma unroll
    for (int i = 0; i < BN / 4; ++i) {
      u32 s = sums[i], q = squares[i];
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        s += shuffle_xor(s, mask);
        q += shuffle_xor(q, mask);
      }
      if (lane < 4) {
        const u32 at = totals + (i / 8 * 32 + lane * 8 + i % 8) * 8;
        add_total(at, static_cast<int>(s));
        add_total(at + BN * 8, q);
      }
      sums[i] = 0, squares[i] = 0;
    }
  }

  DEVICE static void add_total(u32 at, i64 value) {
    u32 v[2];
    load_shared2(v, at);
    const u64 total = (static_cast<u64>(v[1]) << 32 | v[0]) + static_cast<u64>(value);
    store_shared2(at, static_cast<u32>(total), static_cast<u32>(total >> 32));
  }
};

// The channels' values are read once for the rows of all strips: EACH channels at a time, so that
// with two strips they fit into registers beside the counts.
template <int BN, int THREADS, int STRIPS, int COLUMNS>
DEVICE void outputs(const int (&acc)[STRIPS][COLUMNS][4], const Filters<BN, THREADS>& filters,
                    const Params& p, const TileRow (&rows)[STRIPS][2],
                    const Residuals<BN, STRIPS>& residuals, Moments<BN, STRIPS>& moments, int n0,
                    int lane) {
  constexpr int EACH = STRIPS == 1 ? 8 : 4;
  const int t = lane % 4;
  // Every address in shared memory is one of these and a constant.
  Filters<BN, THREADS> mine = filters;
  mine.lines = forget(filters.lines + 32 * t);
  u32 table[STRIPS][2];
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
    for (int h = 0; h < 2; ++h) {
      table[s][h] = forget(filters.table + 32 * t + rows[s][h].label * (BN * 4));
    }
  }
  const auto place = Place<BN>::of(rows[0][0].m, n0, t);
  u32 bits[STRIPS][2] = {};
#pragma unroll
  for (int q = BN / 32 - 1; q >= 0; --q) {
    u32 line[STRIPS][2][8];
#pragma unroll
    for (int first = 8 - EACH; first >= 0; first -= EACH) {
      const int at = 32 * q + first;
      u32 scale[EACH] = {}, bias[EACH] = {}, shift_in[EACH] = {}, slope[EACH] = {};
      u32 shift_out[EACH] = {}, sign_shift[EACH], low[EACH], high[EACH];
      if (SCALE) load_line(scale, mine.line(LINE_SCALE, at));
      if (BIAS) load_line(bias, mine.line(LINE_BIAS, at));
      if (SHIFT_IN) load_line(shift_in, mine.line(LINE_SHIFT_IN, at));
      if (SLOPE) load_line(slope, mine.line(LINE_SLOPE, at));
      if (SHIFT_OUT) load_line(shift_out, mine.line(LINE_SHIFT_OUT, at));
      if (SIGN_SHIFT) load_line(sign_shift, mine.line(LINE_SIGN_SHIFT, at));
      if (THRESHOLD) load_line(low, mine.line(LINE_LOW, at));
      if (THRESHOLD) load_line(high, mine.line(LINE_HIGH, at));
#pragma unroll
      for (int i = 0; i < 2 * STRIPS; ++i) {
        const int s = i / 2, h = i % 2, m = rows[s][h].m;
        const int ones = acc[s][BN / 8][2 * h], base = -2 * ones;
        u32 corr[EACH];
        load_line(corr, table[s][h] + 4 * at);
        float residual[EACH] = {};
        residuals.get(residual, p, place, s, h, q, first, m);
#pragma unroll
        for (int k = EACH - 1; k >= 0; --k) {
          const int c = first + k, count = acc[s][4 * q + c / 2][2 * h + c % 2];
          u32(&to)[8] = line[s][h];
          int dot = 0;
          float y;
          if (integers()) {
            dot = 4 * count + (static_cast<int>(corr[k]) + base);
            y = static_cast<float>(dot);
          } else {  // exact: all are integers below 2^24
            y = multiply_add(static_cast<float>(count), 4.0f,
                             add(float_value(corr[k]), multiply(static_cast<float>(ones), -2.0f)));
          }
          if (MOMENTS && m < p.rows) moments.see(8 * q + c, dot);
          y = finish(y, float_value(scale[k]), float_value(bias[k]), residual[k],
                     float_value(shift_in[k]), float_value(slope[k]), float_value(shift_out[k]), p);
          if (short_output()) {
            const u32 value =
                OUT_TYPE == INT16 ? static_cast<u32>(dot) & 0xFFFF : real_bits(y, dot);
            to[c / 2] = c % 2 ? value << 16 : to[c / 2] | value;
          } else {
            to[c] = real_bits(y, dot);
          }
          // The sign bit of a sum with +0.0 is that of y < 0.
          if (THRESHOLD) {
            const bool inside = dot >= static_cast<int>(low[k]) && dot <= static_cast<int>(high[k]);
            bits[s][h] = funnel(bits[s][h], inside ? 0 : ~0u);
          } else if (PACKED) {
            const float shift = SIGN_SHIFT ? float_value(sign_shift[k]) : 0.0f;
            bits[s][h] = funnel(bits[s][h], float_bits(add(y, shift)));
          }
        }
        if (OUT_TYPE != NONE) store_line<EACH>(p, line[s][h], place, s, h, q, first, m);
      }
    }
  }
  if (!PACKED) return;
  const u32 real = COUT % 32 == 0 ? ~0u : channels_there(COUT - n0 - 32 * (t % (BN / 32)));
#pragma unroll
  for (int s = 0; s < STRIPS; ++s) {
    u32(&both)[2] = bits[s];
    if (BN < 128) both[0] |= both[1] << BN / 4 % 32;
    whole_words<BN>(both, t);
    both[0] = ~both[0] & real, both[1] = ~both[1] & real;
    store_signs<BN>(both, p, rows[s], n0, t);
  }
}
