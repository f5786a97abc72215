// Index arithmetic of the kernels: where a tile's bits come from, where they lie in shared memory,
// and which border class an output pixel has. Plain integers, no instruction of a GPU.
//
// K runs over (tap row, tap column, byte of the pixel), as a filter lies in memory, so that a
// filter's row of K_BYTES is contiguous and a pixel's bytes of one tap are.
#pragma once
#include "types.cuh"

struct Pixel {
  int image, oh, ow;
};

// Without signs a division by a constant takes half the instructions.
HOST_DEVICE Pixel pixel_of(int row) {
  const u32 line = static_cast<u32>(row) / OW, image = line / OH;
  return {static_cast<int>(image), static_cast<int>(line - image * OH),
          static_cast<int>(row - line * OW)};
}

HOST_DEVICE int at_least(int x, int least) { return x < least ? least : x; }
HOST_DEVICE int at_most(int x, int most) { return x > most ? most : x; }

// Taps of `kernel` at first, first + step, ... that fall before the image; `most` do.
HOST_DEVICE int taps_before(int first, int step, int kernel, int most) {
  if (most == 0) return 0;
  if (step == 1 && most < kernel) return at_least(-first, 0);
  if (first >= 0) return 0;
  const int taps = (-first + step - 1) / step;
  return taps < kernel ? taps : kernel;
}

// ... and past the image of `size` pixels.
HOST_DEVICE int taps_past(int first, int step, int kernel, int size, int most) {
  if (most == 0) return 0;
  const int room = size - first;
  if (step == 1 && most < kernel) return at_least(kernel - room, 0);
  if (room <= 0) return kernel;
  const int taps = (room + step - 1) / step;
  return taps < kernel ? kernel - taps : 0;
}

// A border class says how many rows and columns of taps fall outside at each side. Where a window
// is never cut at both ends of an axis (BOTH_H, BOTH_W are 0), the classes of the axis are
// 0, 1 .. TOP, TOP + 1 .. TOP + BOTTOM; otherwise they are the pairs.
struct Cut {
  int before, past;
};

CONSTEXPR int axis_classes(int before, int past, int both) {
  return both ? (before + 1) * (past + 1) : before + past + 1;
}

HOST_DEVICE int axis_class(Cut cut, int before, int past, int both) {
  if (both) return cut.before * (past + 1) + cut.past;
  if (past <= 1) return cut.before + cut.past * (before + 1);
  return cut.past ? before + cut.past : cut.before;
}

CONSTEXPR Cut axis_cut(int label, int before, int past, int both) {
  if (both) return {label / (past + 1), label % (past + 1)};
  return label > before ? Cut{0, label - before} : Cut{label, 0};
}

CONSTEXPR int border_classes() {
  return axis_classes(TOP, BOTTOM, BOTH_H) * axis_classes(LEFT, RIGHT, BOTH_W);
}

// What a row and a column of the output add to it.
HOST_DEVICE int row_class(int oh) {
  const int ih = oh * SH - PT;
  const Cut h = {taps_before(ih, DH, KH, TOP), taps_past(ih, DH, KH, H, BOTTOM)};
  return axis_class(h, TOP, BOTTOM, BOTH_H) * axis_classes(LEFT, RIGHT, BOTH_W);
}

HOST_DEVICE int column_class(int ow) {
  const int iw = ow * SW - PL;
  const Cut w = {taps_before(iw, DW, KW, LEFT), taps_past(iw, DW, KW, W, RIGHT)};
  return axis_class(w, LEFT, RIGHT, BOTH_W);
}

HOST_DEVICE int border_class(Pixel p) { return row_class(p.oh) + column_class(p.ow); }

// Where a row of the tile of activations starts: the first tap of its window. Rows past the end
// carry a position outside every image, so that all their taps read as zeros.
struct alignas(16) Window {
  i64 base;  // bytes from the first word to tap (0, 0); may lie outside the image
  int ih, iw;
};

constexpr int OUTSIDE = -(1 << 30);

HOST_DEVICE Window window_of(int row, int rows) {
  if (row >= rows) return {0, OUTSIDE, 0};
  const Pixel p = pixel_of(row);
  const int ih = p.oh * SH - PT, iw = p.ow * SW - PL;
  return {((static_cast<i64>(p.image) * H + ih) * W + iw) * PIXEL, ih, iw};
}

// A chunk of K: CHUNK bytes of one tap of every window.
struct Chunk {
  int dh, dw;    // offset of its tap in pixels
  i64 distance;  // bytes from the window's base
  bool inside;   // false past the end of K, where the operands are filled up with zeros
};

HOST_DEVICE Chunk chunk_at(int k) {
  const int tap = k / PIXEL;
  const int dh = tap / KW * DH, dw = tap % KW * DW;
  return {dh, dw, (static_cast<i64>(dh) * W + dw) * PIXEL + k % PIXEL, k < K_BYTES};
}

HOST_DEVICE bool reads(const Window& window, const Chunk& chunk) {
  const int ih = window.ih + chunk.dh, iw = window.iw + chunk.dw;
  return chunk.inside && ih >= 0 && ih < H && iw >= 0 && iw < W;
}

// Pixels of a resident kernel in shared memory: lines of the images at a pitch of WP pixels, H of
// HP lines an image; what is past W and H are zeros, enough of them for the window that reaches
// furthest outside. So every tap of a window is at the same distance from its first, and none is
// tested. The columns before a line are those past the line before it.
//
// Where bulk copies bring them (BOXES > 0), those of each image that a tile touches are a box of
// BOX_LINES lines, BOX_STEP pixels after the one before: the first image's from the line where the
// tile's first window starts, the others' from their first line, PT outside. Each follows LEAD
// pixels of zeros.
//
// Where a tile's lines begin: the image, and the line in it, counted from PT before the first,
// where the windows of the tile's first output pixel start.
struct Origin {
  int image, line;
};

HOST_DEVICE Origin origin_of(int row) {
  const Pixel p = pixel_of(row);
  return {p.image, p.oh * SH};
}

// The pixel in shared memory where an output pixel's window starts.
HOST_DEVICE int place_of(Pixel p, Origin o) {
  const int images = p.image - o.image, line = p.oh * SH, column = p.ow * SW + LEAD - PL;
  if (BOXES == 0) return (images * HP + line - o.line) * WP + column;
  if (BOXES == 1) return (line - o.line) * WP + column;
  return line * WP + column + (images > 0 ? images * BOX_STEP : -o.line * WP);
}

// How many lines the windows of a tile read at most, where they are one after the other.
HOST_DEVICE int lines() { return (IMAGE / PIXEL - LEAD) / WP; }

// Bytes of K that a lane reads at once, and how many of them there are.
CONSTEXPR int unit() { return PIXEL % 16 == 0 ? 16 : PIXEL % 8 == 0 ? 8 : 4; }
CONSTEXPR int units() { return K_BYTES / unit(); }
CONSTEXPR int products() { return (K_BYTES + 31) / 32; }

// Where a byte of a pixel lies in shared memory, `place` counting pixels: planes of 16 bytes, so
// that the 16 bytes of 8 neighbouring pixels are in different banks; smaller pixels as they are.
// The planes of a box follow each other, and LEAD pixels of zeros come before the first alone: the
// columns before a plane are the last ones of the plane before.
HOST_DEVICE int pixel_offset(int place, int byte) {
  if (unit() < 16) return place * PIXEL + byte;
  const int plane = (BOXES ? BOX_LINES * WP : IMAGE / PIXEL) * 16;
  return byte / 16 * plane + place * 16 + byte % 16;
}

// From a window's first pixel to unit `u` of it; past the end of K, where filters are 0, to unit 0.
HOST_DEVICE int unit_offset(int u) {
  if (u >= units()) return 0;
  const int byte = u * unit(), tap = byte / PIXEL;
  return pixel_offset(tap / KW * DH * WP + tap % KW * DW, byte % PIXEL);
}

// To unit first + t, which lane t of a quad reads, by few instructions where a unit is a tap. The
// four then begin at most one row of taps.
HOST_DEVICE int unit_offset(int first, int t) {
  if (PIXEL != unit() || KW < 3) return unit_offset(first + t);
  const int column = first % KW, begin = first / KW * DH * WP + column * DW;
  const int offset = begin + t * DW + (t >= KW - column ? DH * WP - KW * DW : 0);
  return first + 3 < units() || first + t < units() ? offset * PIXEL : 0;
}

// The order of K is free as long as both operands keep the same. A product takes 8 words of a
// window and a filter in order, but with units of 8 bytes: there lane t of a quad holds unit t, as
// words t and t + 4 of the product.
struct Slot {
  int product, word;
};

HOST_DEVICE Slot slot_of(u32 word) {
  const int within = word % 8;
  return {static_cast<int>(word / 8), unit() == 8 ? within / 2 + within % 2 * 4 : within};
}

CONSTEXPR int word_at(Slot slot) {
  return 8 * slot.product + (unit() == 8 ? slot.word % 4 * 2 + slot.word / 4 : slot.word);
}

// The order of the filters of a resident kernel: row 32 q + 8 j + 2 t + i of the operand is channel
// 32 q + 8 t + 2 j + i, so that lane t of a quad gets 8 neighbouring channels.
HOST_DEVICE int channel_of(u32 row) {
  return row / 32 * 32 + row % 8 / 2 * 8 + row % 32 / 8 * 2 + row % 2;
}

// Shared tiles. Narrow: rows of 64 bytes, in order. A quarter warp that loads 16 bytes of two rows
// touches 128 contiguous bytes, so there is no bank conflict to swizzle away.
HOST_DEVICE u32 narrow_offset(int row, int byte) { return row * 64 + byte; }

// Wide: rows of 128 bytes whose 16-byte pieces are permuted by the row, the 128-byte swizzle of
// bulk tensor copies and wgmma. Tiles start at multiples of 1024.
HOST_DEVICE u32 wide_offset(u32 row, u32 byte) {
  return row * 128 + ((((byte >> 4) ^ row) & 7) << 4) + (byte & 15);
}

// Descriptor of a wide tile for wgmma, K along the rows: address, 1024 bytes from one group of 8
// rows to the next, layout type 1. The leading dimension is not used and set to 16 bytes.
HOST_DEVICE u64 wide_descriptor(u32 address) {
  return static_cast<u64>(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
