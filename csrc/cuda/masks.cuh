// Rows of bits that lie below the filters of a resident kernel and are multiplied like filters.
//
// The first 8 have ones as far as K reaches: their products with a window are its bits, which the
// and-form needs, and come out in every lane's accumulators. The other 8 have ones in the taps that
// lie inside the image for windows of a border class each: their products with the filters are the
// bits of these taps. Where there are more than 9 classes they are made again for the next 8.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

constexpr int MASKS = 16;                         // rows
constexpr int MASK_WORDS = MASKS * 32;            // of 4 products
constexpr int MOST_MASK_WORDS = MASK_WORDS * 16;  // K is below 2^14

CONSTEXPR int mask_passes() { return border_classes() > 9 ? (border_classes() + 6) / 8 : 1; }

// The class of a row; class 0, of which no tap is cut off, has the first 8.
CONSTEXPR int mask_class(int pass, int row) { return row < 8 ? 0 : 8 * pass + row - 7; }

// The taps inside the image, for windows of a border class.
struct Inside {
  Cut h, w;

  CONSTEXPR static Inside of(int label) {
    const int across = axis_classes(LEFT, RIGHT, BOTH_W);
    return {axis_cut(label / across, TOP, BOTTOM, BOTH_H),
            axis_cut(label % across, LEFT, RIGHT, BOTH_W)};
  }
  // Not those past the end of K.
  CONSTEXPR bool has(int tap) const {
    const int kh = tap / KW, kw = tap % KW;
    return kh >= h.before && kh < KH - h.past && kw >= w.before && kw < KW - w.past;
  }
  CONSTEXPR int count() const { return (KH - h.before - h.past) * (KW - w.before - w.past); }
};

// Word m of a row's 16 bytes of number `piece`.
CONSTEXPR u32 mask_word(const Inside& inside, int piece, int m) {
  const int tap = 4 * word_at({piece / 2, piece % 2 * 4 + m}) / PIXEL;
  return inside.has(tap) ? ~0u : 0;
}

// Those of the first pass, in the swizzle of wide tiles.
CONSTEXPR void make_masks(u32* words) {
  for (int row = 0; row < MASKS; ++row) {
    const Inside inside = Inside::of(mask_class(0, row));
    for (int piece = 0; piece < 2 * products(); ++piece) {
      u32* const to = words + piece / 8 * MASK_WORDS + row * 32 + ((piece ^ row) & 7) * 4;
      for (int m = 0; m < 4; ++m) to[m] = mask_word(inside, piece, m);
    }
  }
}

// Products of classes 2 i + 1 and 2 i + 2, less those of class 0.
struct alignas(8) Cuts {
  int v[2];

  CONSTEXPR static Cuts of(int i) {
    return {{CHANNELS * (Inside::of(2 * i + 1).count() - KH * KW),
             CHANNELS * (Inside::of(2 * i + 2).count() - KH * KW)}};
  }
};

#ifdef BITKERNELS_EMULATED
inline const u32* first_masks() {
  alignas(128) static u32 words[MOST_MASK_WORDS];
  make_masks(words);
  return words;
}
inline Cuts cut_products(int i) { return Cuts::of(i); }
#else
struct FirstMasks {
  alignas(128) u32 words[(products() + 3) / 4 * MASK_WORDS];
  constexpr DEVICE FirstMasks() : words() { make_masks(words); }
};
__device__ const FirstMasks FIRST_MASKS{};
DEVICE const u32* first_masks() { return FIRST_MASKS.words; }

struct AllCuts {
  Cuts v[4 * mask_passes()];
  constexpr DEVICE AllCuts() : v() {
    for (int i = 0; i < 4 * mask_passes(); ++i) v[i] = Cuts::of(i);
  }
};
__constant__ const AllCuts ALL_CUTS{};
DEVICE Cuts cut_products(int i) { return ALL_CUTS.v[i]; }
#endif
