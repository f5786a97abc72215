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

// The residuals of a lane, of which 16-bit ones can be on their way while the products run.
template <int BN>
struct Residuals {
  u32 v[2][BN / 32][4];

  DEVICE void fetch(const Params& p, const TileRow (&rows)[2], int n0, int t) {
    if (!short_residual() || !wide()) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int q = 0; q < BN / 32; ++q) {
        const int channel = n0 + 32 * q + 8 * t;
        const bool inside = rows[h].m < p.rows && (COUT % BN == 0 || channel < COUT);
        for (u32& x : v[h][q]) x = 0;
        if (inside) {
          load4(v[h][q], reinterpret_cast<const u32*>(static_cast<const u16*>(p.residual) +
                                                      element(rows[h].m, channel)));
        }
      }
    }
  }

  // 8 channels of a row.
  DEVICE void get(float (&r)[8], const Params& p, int h, int q, int m, int channel) const {
    if (short_residual() && wide()) {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const u32 pair = v[h][q][k / 2];
        r[k] = residual_value(k % 2 ? pair >> 16 : pair & 0xFFFF);
      }
      return;
    }
    if (RESIDUAL == NONE) return;
    const bool whole = m < p.rows && (COUT % BN == 0 || channel + 7 < COUT);
    if (wide() && whole) {
#pragma unroll
      for (int k = 0; k < 8; k += 4) {
        u32 x[4];
        load4(x, static_cast<const u32*>(p.residual) + element(m, channel) + k);
        for (int i = 0; i < 4; ++i) r[k + i] = float_value(x[i]);
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const bool inside = m < p.rows && channel + k < COUT;
      r[k] = inside ? residual_value(residual_at(p, element(m, channel + k))) : 0.0f;
    }
  }
};

// Stores 8 channels of a row; of 16-bit types pairs in the first four of `line`.
DEVICE void store_line(const Params& p, const u32 (&line)[8], int m, int channel, int room) {
  if (m >= p.rows || room <= 0) return;
  if (wide()) {
    if (short_output()) {
      store4(static_cast<u16*>(p.out) + element(m, channel), {line[0], line[1], line[2], line[3]});
    } else {
      u32* const to = static_cast<u32*>(p.out) + element(m, channel);
      store4(to, {line[0], line[1], line[2], line[3]});
      store4(to + 4, {line[4], line[5], line[6], line[7]});
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (k >= room) break;
    const i64 at = element(m, channel + k);
    if (short_output()) {
      store(static_cast<u16*>(p.out) + at, static_cast<u16>(line[k / 2] >> k % 2 * 16));
    } else {
      store(static_cast<u32*>(p.out) + at, line[k]);
    }
  }
}

// The 8 values of a line in shared memory from `channel` on.
DEVICE void load_line(u32 (&v)[8], u32 address) {
  load_shared4(reinterpret_cast<u32(&)[4]>(v[0]), address);
  load_shared4(reinterpret_cast<u32(&)[4]>(v[4]), address + 16);
}

// What a lane has seen of its channels, BN / 4 of them, 8 in every 32: sums of the dot products, or
// of their positive parts, and of their squares.
template <int BN>
struct Moments {
  int sums[BN / 4] = {};
  u32 squares[BN / 4] = {};

  // Tiles after which the squares of the 16 rows that the lanes of a column have might overflow.
  HOST_DEVICE static int most_tiles() {
    const u64 products = CHANNELS * KH * KW, most = 0xFFFFFFFFull / (16 * products * products);
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

template <int BN, int THREADS, int COLUMNS>
DEVICE void outputs(const int (&acc)[COLUMNS][4], const Filters<BN, THREADS>& filters,
                    const Params& p, const TileRow (&rows)[2], const Residuals<BN>& residuals,
                    Moments<BN>& moments, int n0, int lane) {
  const int t = lane % 4;
  u32 bits[2] = {};
#pragma unroll
  for (int q = BN / 32 - 1; q >= 0; --q) {
    const u32 at = 32 * q + 8 * t;
    const int channel = n0 + at, room = COUT % BN == 0 ? 8 : COUT - channel;
    u32 scale[8] = {}, bias[8] = {}, shift_in[8] = {}, slope[8] = {}, shift_out[8] = {};
    u32 sign_shift[8], low[8], high[8];
    if (SCALE) load_line(scale, filters.line(LINE_SCALE, at));
    if (BIAS) load_line(bias, filters.line(LINE_BIAS, at));
    if (SHIFT_IN) load_line(shift_in, filters.line(LINE_SHIFT_IN, at));
    if (SLOPE) load_line(slope, filters.line(LINE_SLOPE, at));
    if (SHIFT_OUT) load_line(shift_out, filters.line(LINE_SHIFT_OUT, at));
    if (SIGN_SHIFT) load_line(sign_shift, filters.line(LINE_SIGN_SHIFT, at));
    if (THRESHOLD) load_line(low, filters.line(LINE_LOW, at));
    if (THRESHOLD) load_line(high, filters.line(LINE_HIGH, at));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int base = -2 * acc[BN / 8][2 * h];
      u32 corr[8], line[8];
      load_line(corr, filters.table + (rows[h].label * BN + at) * 4);
      float residual[8] = {};
      residuals.get(residual, p, h, q, rows[h].m, channel);
#pragma unroll
      for (int k = 7; k >= 0; --k) {
        const int count = acc[4 * q + k / 2][2 * h + k % 2];
        int dot = 0;
        float y;
        if (integers()) {
          dot = 4 * count + (static_cast<int>(corr[k]) + base);
          y = static_cast<float>(dot);
        } else {  // exact: all are integers below 2^24
          y = multiply_add(static_cast<float>(count), 4.0f,
                           add(float_value(corr[k]), static_cast<float>(base)));
        }
        if (MOMENTS && rows[h].m < p.rows) moments.see(8 * q + k, dot);
        y = finish(y, float_value(scale[k]), float_value(bias[k]), residual[k],
                   float_value(shift_in[k]), float_value(slope[k]), float_value(shift_out[k]), p);
        if (short_output()) {
          const u32 value = OUT_TYPE == INT16 ? static_cast<u32>(dot) & 0xFFFF : real_bits(y, dot);
          line[k / 2] = k % 2 ? value << 16 : line[k / 2] | value;
        } else {
          line[k] = real_bits(y, dot);
        }
        // The sign bit of a sum with +0.0 is that of y < 0.
        if (THRESHOLD) {
          const bool inside = dot >= static_cast<int>(low[k]) && dot <= static_cast<int>(high[k]);
          bits[h] = funnel(bits[h], inside ? 0 : ~0u);
        } else if (PACKED) {
          bits[h] =
              funnel(bits[h], float_bits(add(y, SIGN_SHIFT ? float_value(sign_shift[k]) : 0.0f)));
        }
      }
      if (OUT_TYPE != NONE) store_line(p, line, rows[h].m, channel, room);
    }
  }
  if (!PACKED) return;
  if (BN < 128) bits[0] |= bits[1] << BN / 4 % 32;
  whole_words<BN>(bits, t);
  const u32 real = COUT % 32 == 0 ? ~0u : channels_there(COUT - n0 - 32 * (t % (BN / 32)));
  bits[0] = ~bits[0] & real, bits[1] = ~bits[1] & real;
  store_signs<BN>(bits, p, rows, n0, t);
}
