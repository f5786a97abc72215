// Everything between the counts of a tile and the outputs: the integer dot product, the epilogue of
// docs/architecture.md in float32 with one rounding a step, real values and packed signs.
//
// Counts arrive as the tensor cores leave them: fragments of 16 rows, of which lane l holds rows
// l / 4 and l / 4 + 8, and of every 8 columns 2 (l % 4) and the next. So the four lanes of a quad
// hold whole rows, 32 columns of them are one packed word, and two shuffles build it.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// v[j] of lane t becomes v[t] of lane j, within a quad.
DEVICE void quad_transpose(u32 (&v)[4], int t) {
  const bool odd = t & 1, high = t & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = shuffle_xor(odd ? v[i] : v[i + 1], 1);
    (odd ? v[i] : v[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const u32 got = shuffle_xor(high ? v[i] : v[i + 2], 2);
    (high ? v[i] : v[i + 2]) = got;
  }
}

// Byte j of lane t becomes byte t of lane j, within a quad.
DEVICE u32 bytes_transpose(u32 w, int t) {
  w = permute(w, shuffle_xor(w, 1), t & 1 ? 0x3715 : 0x6240);
  return permute(w, shuffle_xor(w, 2), t & 2 ? 0x3276 : 0x5410);
}

// Whether a step in float32 stands between dot product and sign.
HOST_DEVICE bool float_steps() {
  return CLAMP_MIN || CLAMP_MAX || SCALE || BIAS || RESIDUAL != NONE || SLOPE || SIGN_SHIFT;
}

// Whether signs are comparisons of the dot product.
HOST_DEVICE bool signs_by_table() { return PACKED && (THRESHOLD || !float_steps()); }

// The bits of a word of which `left` channels, and all that follow, are there.
DEVICE u32 channels_there(int left) { return left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0; }

constexpr int MOST = 1 << 29;  // every dot product is between -MOST and MOST

// The dot products of a channel that give a 1: from `low` on, or (flip) those below it; where
// `between`, only those below `end`.
struct Bounds {
  int low, end;
  bool flip, between;

  // low <= dot <= high; a channel that is not there has no ones.
  HOST_DEVICE static Bounds of(int low, int high, bool there) {
    const int most = CHANNELS * KH * KW;
    if (!there || low > high || low > most || high < -most) return {MOST, MOST, false, false};
    const bool below = low > -most, above = high < most;
    if (above && !below) return {high + 1, MOST, true, false};
    return {below ? low : -most, above ? high + 1 : MOST, false, below && above};
  }
};

// T, with which dot >= bound is the sign bit of T[pa & 1] + (pa >> 1) - acc:
//
//   dot = 4 acc + corr - 2 pa,  T[parity] = ceil((bound - corr + 2 parity) / 4) - 1
HOST_DEVICE int table_entry(int bound, int corr, int parity) {
  return ((bound - corr + 2 * parity + 3) >> 2) - 1;
}

// Two neighbouring values, the first at an even index. Where the row length is even they are read
// at once; past the last channel the last one is read again and nothing is stored.
template <class T>
struct Pair {
  T v[2];
};

template <class T>
DEVICE Pair<T> load_pair(const T* row, int column) {
  Pair<T> pair;
  if (COUT % 2 == 0) {
    load2(pair.v, row + (column < COUT ? column : COUT - 2));
  } else {
    pair.v[0] = load(row + (column < COUT ? column : COUT - 1));
    pair.v[1] = load(row + (column + 1 < COUT ? column + 1 : COUT - 1));
  }
  return pair;
}

// The epilogue's values of two output channels; absent ones are never looked at.
struct Channels {
  Pair<float> scale, bias, shift_in, slope, shift_out, sign_shift;
  Pair<int> low, high;

  DEVICE static Channels at(const Params& p, int column) {
    Channels c;
    if (SCALE) c.scale = load_pair(p.scale, column);
    if (BIAS) c.bias = load_pair(p.bias, column);
    if (SHIFT_IN) c.shift_in = load_pair(p.shift_in, column);
    if (SLOPE) c.slope = load_pair(p.slope, column);
    if (SHIFT_OUT) c.shift_out = load_pair(p.shift_out, column);
    if (SIGN_SHIFT) c.sign_shift = load_pair(p.sign_shift, column);
    if (THRESHOLD) {
      c.low = load_pair(p.threshold, column);
      c.high.v[0] = load(p.threshold + COUT + (column < COUT ? column : COUT - 1));
      c.high.v[1] = load(p.threshold + COUT + (column + 1 < COUT ? column + 1 : COUT - 1));
    }
    return c;
  }
};

// The corrections of two channels for a border class, as `prepare` left them.
struct PreparedCorrections {
  const int* corr;

  DEVICE Pair<int> operator()(int label, int column) const {
    return load_pair(corr + label * COUT, column);
  }
};

// An element of the output and of the residual.
DEVICE i64 element(int m, int channel) {
  if (NHWC) return static_cast<i64>(m) * COUT + channel;
  const Pixel at = pixel_of(m);
  return (static_cast<i64>(at.image) * COUT + channel) * (OH * OW) + at.oh * OW + at.ow;
}

// A row of the tile, one past the last computed as the last and not stored.
struct Row {
  int m;
  int base;   // -2 popcount(window)
  int label;  // its border class
  bool inside;

  DEVICE static Row at(const Params& p, int m, int pa) {
    const bool inside = m < p.rows;
    if (!inside) m = p.rows - 1;
    return {m, -2 * pa, border_classes() > 1 ? border_class(pixel_of(m)) : 0, inside};
  }

  DEVICE i64 offset(int column) const { return element(m, column); }
};

DEVICE float residual_value(u32 bits) {
  if (RESIDUAL == FLOAT32) return float_value(bits);
  return RESIDUAL == FLOAT16 ? half_value(bits) : bfloat_value(bits);
}

DEVICE u32 residual_at(const Params& p, i64 at) {
  if (RESIDUAL == FLOAT32) return load(static_cast<const u32*>(p.residual) + at);
  return load(static_cast<const u16*>(p.residual) + at);
}

DEVICE Pair<float> residuals(const Params& p, const Row& r, int column) {
  Pair<float> pair;
  if (NHWC && RESIDUAL == FLOAT32) {
    const Pair<u32> bits = load_pair(static_cast<const u32*>(p.residual) + r.offset(0), column);
    for (int i = 0; i < 2; ++i) pair.v[i] = residual_value(bits.v[i]);
  } else if (NHWC) {
    const Pair<u16> bits = load_pair(static_cast<const u16*>(p.residual) + r.offset(0), column);
    for (int i = 0; i < 2; ++i) pair.v[i] = residual_value(bits.v[i]);
  } else {
    for (int i = 0; i < 2; ++i) {
      const int inside = column + i < COUT ? column + i : COUT - 1;
      pair.v[i] = residual_value(residual_at(p, r.offset(inside)));
    }
  }
  return pair;
}

// clamp, scale and bias, residual, RPReLU.
DEVICE float finish(float y, float scale, float bias, float residual, float shift_in, float slope,
                    float shift_out, const Params& p) {
  if (CLAMP_MIN) y = y < p.clamp_min ? p.clamp_min : y;
  if (CLAMP_MAX) y = y > p.clamp_max ? p.clamp_max : y;
  if (SCALE) y = multiply(y, scale);
  if (BIAS) y = add(y, bias);
  if (RESIDUAL != NONE) y = add(y, residual);
  if (SLOPE) {
    if (SHIFT_IN) y = add(y, shift_in);
    y = y > 0 ? y : multiply(y, slope);
    if (SHIFT_OUT) y = add(y, shift_out);
  }
  return y;
}

DEVICE float finish(int dot, const Channels& c, int i, float residual, const Params& p) {
  return finish(static_cast<float>(dot), c.scale.v[i], c.bias.v[i], residual, c.shift_in.v[i],
                c.slope.v[i], c.shift_out.v[i], p);
}

DEVICE bool sign_of(float y, int dot, const Channels& c, int i) {
  if (THRESHOLD) return dot >= c.low.v[i] && dot <= c.high.v[i];
  if (SIGN_SHIFT) y = add(y, c.sign_shift.v[i]);
  return !(y < 0);
}

DEVICE u32 real_bits(float y, int dot) {
  if (OUT_TYPE == INT32) return static_cast<u32>(dot);
  if (OUT_TYPE == FLOAT16) return half_bits(y);
  if (OUT_TYPE == BFLOAT16) return bfloat_bits(y);
  return float_bits(y);
}

// Stores 32 columns of a row, of which this lane has 8 j + 2 t + i in v[j][i].
DEVICE void store_row(const Params& p, const Row& r, int first, const u32 (&v)[4][2], int t) {
  const bool SHORT = OUT_TYPE == FLOAT16 || OUT_TYPE == BFLOAT16;
  if (SHORT && NHWC && COUT % 8 == 0) {
    // After the transposition a lane holds 8 neighbouring channels: one 16-byte store.
    u32 line[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = v[j][0] | v[j][1] << 16;
    quad_transpose(line, t);
    if (r.inside && first + 8 * t < COUT) {
      store4(static_cast<u16*>(p.out) + r.offset(first + 8 * t), line);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int column = first + 8 * j + 2 * t;
    if (!SHORT && NHWC && COUT % 2 == 0) {
      if (r.inside && column < COUT) {
        store2(static_cast<u32*>(p.out) + r.offset(column), v[j][0], v[j][1]);
      }
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!r.inside || column + i >= COUT) continue;
      if (SHORT) {
        store(static_cast<u16*>(p.out) + r.offset(column + i), static_cast<u16>(v[j][i]));
      } else {
        store(static_cast<u32*>(p.out) + r.offset(column + i), v[j][i]);
      }
    }
  }
}

// MT fragments of 16 rows and NT of 8 columns; further columns of acc are left out. Row f of
// fragment i is first_row + 16 i + f; pa[i] are the window counts of this lane's two rows
// of it; corrections(border class, column) are those of a channel and the next. Consumes acc.
//
// Nothing branches around a shuffle, so all columns of the tile are gone through; those past the
// last are computed from its values and not stored. Two rows at a time, and the channels' values
// read again for each: to keep the addresses of all rows in registers beside the counts costs
// spills.
template <int NT, int MT, int COLUMNS, class Corrections>
DEVICE void epilogue(int (&acc)[MT][COLUMNS][4], const int (&pa)[MT][2], const Params& p,
                     const Corrections& corrections, int first_row, int first_column, int lane) {
  static_assert(NT % 4 == 0 && NT <= COLUMNS, "whole packed words");
  const int t = lane % 4;
#pragma unroll
  for (int f = 0; f < MT; ++f) {
    const int m = first_row + 16 * f + lane / 4;
    const Row rows[2] = {Row::at(p, m, pa[f][0]), Row::at(p, m + 8, pa[f][1])};
#pragma unroll
    for (int q = 0; q < NT / 4; ++q) {
      const int first = first_column + 32 * q;
      if (!any_lane(first < COUT)) break;
      u32 bits[2] = {};
      u32 real[2][4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first + 8 * j + 2 * t;
        const Channels c = Channels::at(p, column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Pair<int> corr = corrections(rows[h].label, column);
          Pair<float> residual = {};
          if (RESIDUAL != NONE) residual = residuals(p, rows[h], column);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int dot = 4 * acc[f][4 * q + j][2 * h + i] + rows[h].base + corr.v[i];
            const float y = finish(dot, c, i, residual.v[i], p);
            if (PACKED && sign_of(y, dot, c, i) && column + i < COUT) {
              bits[h] |= 1u << (8 * j + 2 * t + i);
            }
            real[h][j][i] = real_bits(y, dot);
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (OUT_TYPE != NONE) store_row(p, rows[h], first, real[h], t);
        if (PACKED) {
          u32 word = bits[h];
          word |= shuffle_xor(word, 1);
          word |= shuffle_xor(word, 2);
          if (rows[h].inside && t == q % 4) {
            store(p.packed + static_cast<i64>(rows[h].m) * ((COUT + 31) / 32) + first / 32, word);
          }
        }
      }
    }
  }
}
