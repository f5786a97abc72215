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

// The values of one output channel, absent ones neutral and never read.
struct Channel {
  float scale, bias, shift_in, slope, shift_out, sign_shift;
  int low, high;
  bool real;  // false past the last channel

  DEVICE static Channel at(const Params& p, int n) {
    Channel c = {1, 0, 0, 1, 0, 0, 0, 0, n < COUT};
    if (!c.real) return c;
    if (SCALE) c.scale = load(p.scale + n);
    if (BIAS) c.bias = load(p.bias + n);
    if (SHIFT_IN) c.shift_in = load(p.shift_in + n);
    if (SLOPE) c.slope = load(p.slope + n);
    if (SHIFT_OUT) c.shift_out = load(p.shift_out + n);
    if (SIGN_SHIFT) c.sign_shift = load(p.sign_shift + n);
    if (THRESHOLD) c.low = load(p.threshold + n), c.high = load(p.threshold + COUT + n);
    return c;
  }
};

DEVICE float residual_at(const void* residual, i64 at) {
  if (RESIDUAL == FLOAT32) return load(static_cast<const float*>(residual) + at);
  const u32 bits = load(static_cast<const u16*>(residual) + at);
  return RESIDUAL == FLOAT16 ? half_value(bits) : bfloat_value(bits);
}

// clamp, scale and bias, residual, RPReLU.
DEVICE float finish(int dot, const Channel& c, const Params& p, i64 at) {
  float y = static_cast<float>(dot);
  if (CLAMP_MIN) y = y < p.clamp_min ? p.clamp_min : y;
  if (CLAMP_MAX) y = y > p.clamp_max ? p.clamp_max : y;
  if (SCALE) y = multiply(y, c.scale);
  if (BIAS) y = add(y, c.bias);
  if (RESIDUAL != NONE && c.real) y = add(y, residual_at(p.residual, at));
  if (SLOPE) {
    if (SHIFT_IN) y = add(y, c.shift_in);
    y = y > 0 ? y : multiply(y, c.slope);
    if (SHIFT_OUT) y = add(y, c.shift_out);
  }
  return y;
}

DEVICE u32 sign_bit(float y, int dot, const Channel& c) {
  if (!c.real) return 0;
  if (THRESHOLD) return dot >= c.low && dot <= c.high;
  if (SIGN_SHIFT) y = add(y, c.sign_shift);
  return !(y < 0);
}

DEVICE u32 real_bits(float y, int dot) {
  if (OUT_TYPE == INT32) return static_cast<u32>(dot);
  if (OUT_TYPE == FLOAT16) return half_bits(y);
  if (OUT_TYPE == BFLOAT16) return bfloat_bits(y);
  return float_bits(y);
}

// The outputs of one row of the tile.
struct Row {
  int m;
  bool inside;
  int pa;           // bits set in the window
  const int* corr;  // of its border class
  i64 out;          // of channel 0, in elements
  int step;         // from one channel to the next

  DEVICE static Row at(const Params& p, int m, int pa) {
    Row r = {m, m < p.rows, pa, p.corr, static_cast<i64>(m) * COUT, 1};
    if (!r.inside) return r;
    const bool classes = border_classes() > 1;
    if (classes || !NHWC) {
      const Pixel pixel = pixel_of(m);
      if (classes) r.corr += static_cast<i64>(border_class(pixel)) * COUT;
      if (!NHWC) {
        r.out = static_cast<i64>(pixel.image) * COUT * (OH * OW) + pixel.oh * OW + pixel.ow;
        r.step = OH * OW;
      }
    }
    return r;
  }
};

DEVICE void store_row(const Params& p, const Row& r, int n, u32 (&v)[4][2], int t) {
  if (OUT_TYPE == FLOAT16 || OUT_TYPE == BFLOAT16) {
    // After the transposition a lane holds 8 neighbouring channels: one 16-byte store.
    u32 line[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) line[j] = v[j][0] | v[j][1] << 16;
    if (NHWC && COUT % 8 == 0) {
      quad_transpose(line, t);
      if (r.inside && n + 8 * t < COUT) {
        store4(static_cast<u16*>(p.out) + r.out + n + 8 * t, line);
      }
      return;
    }
  }
  if (!r.inside) return;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = n + 8 * j + 2 * t + i;
      if (column >= COUT) continue;
      const i64 at = r.out + static_cast<i64>(column) * r.step;
      if (OUT_TYPE == FLOAT16 || OUT_TYPE == BFLOAT16) {
        store(static_cast<u16*>(p.out) + at, static_cast<u16>(v[j][i]));
      } else {
        store(static_cast<u32*>(p.out) + at, v[j][i]);
      }
    }
  }
}

// MT fragments of 16 rows and NT of 8 columns. Row f of fragment i is first_row + i * ROW_STEP + f;
// pa[i] are the window counts of this lane's two rows of it. Consumes acc.
template <int MT, int NT, int ROW_STEP>
DEVICE void epilogue(int (&acc)[MT][NT][4], const int (&pa)[MT][2], const Params& p, int first_row,
                     int first_column, int lane) {
  static_assert(NT % 4 == 0, "whole packed words");
  const int t = lane % 4;
#pragma unroll
  for (int q = 0; q < NT / 4; ++q) {
    const int n = first_column + 32 * q;
    u32 bits[MT][2] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = n + 8 * j + 2 * t + i;
        const Channel c = Channel::at(p, column);
#pragma unroll
        for (int f = 0; f < MT; ++f) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const Row r = Row::at(p, first_row + f * ROW_STEP + lane / 4 + 8 * h, pa[f][h]);
            int& cell = acc[f][4 * q + j][2 * h + i];
            if (!r.inside || !c.real) continue;
            const int dot = 4 * cell - 2 * r.pa + load(r.corr + column);
            const float y = finish(dot, c, p, r.out + static_cast<i64>(column) * r.step);
            if (PACKED) bits[f][h] |= sign_bit(y, dot, c) << (8 * j + 2 * t + i);
            if (OUT_TYPE != NONE) cell = static_cast<int>(real_bits(y, dot));
          }
        }
      }
    }
#pragma unroll
    for (int f = 0; f < MT; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Row r = Row::at(p, first_row + f * ROW_STEP + lane / 4 + 8 * h, pa[f][h]);
        if (OUT_TYPE != NONE) {
          u32 v[4][2];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            v[j][0] = static_cast<u32>(acc[f][4 * q + j][2 * h]);
            v[j][1] = static_cast<u32>(acc[f][4 * q + j][2 * h + 1]);
          }
          store_row(p, r, n, v, t);
        }
        if (PACKED) {
          u32 word = bits[f][h];
          word |= shuffle_xor(word, 1);
          word |= shuffle_xor(word, 2);
          const int at = n / 32, words = (COUT + 31) / 32;
          if (r.inside && t == q % 4 && at < words) {
            store(p.packed + static_cast<i64>(r.m) * words + at, word);
          }
        }
      }
    }
  }
}
