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

HOST_DEVICE Pixel pixel_of(int row) {
  const int line = row / OW;
  return {line / OH, line % OH, row % OW};
}

// Taps of KERNEL at first, first + step, ... that fall before the image.
HOST_DEVICE int taps_before(int first, int step, int kernel) {
  if (first >= 0) return 0;
  const int taps = (-first + step - 1) / step;
  return taps < kernel ? taps : kernel;
}

// ... and past the image of `size` pixels.
HOST_DEVICE int taps_past(int first, int step, int kernel, int size) {
  const int room = size - first;
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

HOST_DEVICE int axis_classes(int before, int past, int both) {
  return both ? (before + 1) * (past + 1) : before + past + 1;
}

HOST_DEVICE int axis_class(Cut cut, int before, int past, int both) {
  if (both) return cut.before * (past + 1) + cut.past;
  return cut.past ? before + cut.past : cut.before;
}

HOST_DEVICE Cut axis_cut(int label, int before, int past, int both) {
  if (both) return {label / (past + 1), label % (past + 1)};
  return label > before ? Cut{0, label - before} : Cut{label, 0};
}

HOST_DEVICE int border_classes() {
  return axis_classes(TOP, BOTTOM, BOTH_H) * axis_classes(LEFT, RIGHT, BOTH_W);
}

HOST_DEVICE int border_class(Pixel p) {
  const int ih = p.oh * SH - PT, iw = p.ow * SW - PL;
  const Cut h = {taps_before(ih, DH, KH), taps_past(ih, DH, KH, H)};
  const Cut w = {taps_before(iw, DW, KW), taps_past(iw, DW, KW, W)};
  return axis_class(h, TOP, BOTTOM, BOTH_H) * axis_classes(LEFT, RIGHT, BOTH_W) +
         axis_class(w, LEFT, RIGHT, BOTH_W);
}

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

// The pixels that the windows of output pixels `first` to `last` read, numbered over all images:
// one contiguous range, since so are rows of an image, and images.
struct Span {
  i64 begin, end;
};

HOST_DEVICE i64 line_of(int image, int ih) {
  return (static_cast<i64>(image) * H + (ih < 0 ? 0 : ih < H ? ih : H)) * W;
}

HOST_DEVICE Span span_of(int first, int last) {
  const Pixel a = pixel_of(first), b = pixel_of(last);
  return {line_of(a.image, a.oh * SH - PT), line_of(b.image, b.oh * SH - PT + (KH - 1) * DH + 1)};
}

// Fragments that come straight from a window's bytes. K goes in steps of 64 bytes, two products of
// 256 bits, of which lane t of a quad holds 16 contiguous bytes t: words 4t and 4t + 1 for the
// first product, 4t + 2 and 4t + 3 for the second. A rest of up to 32 bytes is one product, with 8
// bytes a lane. The order of K is free as long as both operands keep the same; hence slot_of.
HOST_DEVICE int whole_steps() { return K_BYTES / 64 + (K_BYTES % 64 > 32); }
HOST_DEVICE int half_steps() { return K_BYTES % 64 > 0 && K_BYTES % 64 <= 32; }
HOST_DEVICE int products() { return (K_BYTES + 31) / 32; }

// Where word `word` of a filter goes: a product, and one of the 8 words of its 256 bits.
struct Slot {
  int product, word;
};

HOST_DEVICE Slot slot_of(int word) {
  const int step = word / 16, within = word % 16;
  if (step < whole_steps()) return {2 * step + within % 4 / 2, within / 4 + within % 2 * 4};
  return {2 * step, within / 2 + within % 2 * 4};
}

// Shared tiles. Narrow: rows of 64 bytes, in order. A quarter warp that loads 16 bytes of two rows
// touches 128 contiguous bytes, so there is no bank conflict to swizzle away.
HOST_DEVICE u32 narrow_offset(int row, int byte) { return row * 64 + byte; }

// Wide: rows of 128 bytes whose 16-byte pieces are permuted by the row, the 128-byte swizzle of
// bulk tensor copies and wgmma. Tiles start at multiples of 1024.
HOST_DEVICE u32 wide_offset(int row, int byte) {
  return row * 128 + ((((byte >> 4) ^ row) & 7) << 4) + (byte & 15);
}

// Descriptor of a wide tile for wgmma, K along the rows: address, 1024 bytes from one group of 8
// rows to the next, layout type 1. The leading dimension is not used and set to 16 bytes.
HOST_DEVICE u64 wide_descriptor(u32 address) {
  return static_cast<u64>(address >> 4 & 0x3FFF) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
