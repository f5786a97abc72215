// The windows of a resident kernel: pixels come to shared memory by bulk copies or by cp.async,
// with zeros around the images, and from there into the fragments of wgmma. Nothing is unfolded.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// The borders left and right of all lines, which no copy writes. By the threads of a warpgroup.
DEVICE void clear_borders(u32 pixels, int thread) {
  const u32 words = PIXEL / 4, right = WP > W ? WP - W : 1;
#pragma unroll 1
  for (u32 i = thread; i < (LEAD + lines() * (WP - W)) * words; i += 128) {
    const int border = i / words;
    const u32 after = border - LEAD;
    const int place = border < LEAD ? border : after / right * WP + LEAD + W + after % right;
    store_shared(pixels + pixel_offset(place, i % words * 4), 0);
  }
}

template <int SIZE>
DEVICE void clear(u32 address) {
  if (SIZE == 16) {
    store_shared4(address, {0, 0, 0, 0});
  } else if (SIZE == 8) {
    store_shared2(address, 0, 0);
  } else {
    store_shared(address, 0);
  }
}

// Starts to copy the lines of a tile from the `begin`th on, by the threads of a warpgroup; those
// outside the images are zeros. Some lanes of a warp share a line.
template <int SIZE>
DEVICE void copy_lines(u32 pixels, const Params& p, int begin, int thread) {
  const int chunks = W * PIXEL / SIZE, rounds = (chunks + 31) / 32;
  const int across = chunks > 16 ? 32 : chunks > 8 ? 16 : chunks > 4 ? 8 : chunks > 2 ? 4 : 2;
  const int each = 128 / across;  // lines at a time
  const int lane = thread % across;
  const unsigned char* const words = reinterpret_cast<const unsigned char*>(p.words) + lane * SIZE;
#pragma unroll 2
  for (int turn = 0; turn < (lines() + each - 1) / each; ++turn) {
    const int i = turn * each + thread / across;
    if (lines() % each && i >= lines()) break;
    // Lines are counted from PT before the first; HP more keep the dividend positive.
    const u32 line = begin + i + (HP - PT), above = line / HP, ih = line - above * HP;
    const int image = static_cast<int>(above) - 1;
    const bool inside = ih < H && static_cast<u32>(image) < static_cast<u32>(p.images);
    const unsigned char* const from =
        words + static_cast<i64>(image * H + static_cast<int>(ih)) * (W * PIXEL);
#pragma unroll
    for (int round = 0; round < rounds; ++round) {
      const u32 c = round * 32 + lane;
      if (chunks % across && c >= chunks) break;
      const u32 to = pixels + pixel_offset(i * WP + LEAD + c * SIZE / PIXEL, c * SIZE % PIXEL);
      if (inside) {
        copy_async<SIZE>(to, from + round * 32 * SIZE);
      } else {
        clear<SIZE>(to);
      }
    }
  }
}

DEVICE void copy_lines(u32 pixels, const Params& p, int begin, int thread) {
  if (LINE_CHUNK == 16) {
    copy_lines<16>(pixels, p, begin, thread);
  } else if (LINE_CHUNK == 8) {
    copy_lines<8>(pixels, p, begin, thread);
  } else {
    copy_lines<4>(pixels, p, begin, thread);
  }
}

// Bytes of a place in shared memory: of a pixel, or of its part of a plane.
HOST_DEVICE int place_bytes() { return unit() == 16 ? 16 : PIXEL; }

HOST_DEVICE int box_bytes() { return BOX_LINES * WP * PIXEL; }

// The zeros before each of `boxes` boxes, as far as windows read them, which no copy writes. By one
// warp.
DEVICE void clear_leads(u32 pixels, int boxes, int lane) {
  const int each = (PL * place_bytes() + 15) / 16, first = LEAD * place_bytes() - each * 16;
#pragma unroll 1
  for (int i = lane; i < boxes * each; i += 32) {
    const int box = each > 1 ? i / each : i;
    store_shared4(pixels + box * BOX_STEP * place_bytes() + first + (i - box * each) * 16,
                  {0, 0, 0, 0});
  }
}

// Starts to copy the boxes of a tile of ROWS output pixels, by one thread. What lies outside an
// image, or past the last one, is written as zeros.
template <int ROWS>
DEVICE void copy_boxes(u32 pixels, const TensorMap& map, int first, Origin from, u32 barrier) {
  // Output pixels from the start of the first image to the last of the tile.
  const int last = first - from.image * (OH * OW) + ROWS - 1;
  int boxes = 1;
#pragma unroll
  for (int box = 1; box < BOXES; ++box) boxes += last >= box * (OH * OW);
  barrier_arrive_expect(barrier, boxes * box_bytes());
#pragma unroll
  for (int box = 0; box < BOXES; ++box) {
    if (box >= boxes) break;
    const u32 to = pixels + (box * BOX_STEP + LEAD) * place_bytes();
    const int line = (box ? 0 : from.line) - PT, image = from.image + box;
    if (PIXEL > 16 && unit() == 16) {
      copy_bulk(to, map, 0, 0, line, 0, image, barrier);
    } else {
      copy_bulk(to, map, 0, line, image, barrier);
    }
  }
}

// What a lane reads of 16 windows of its warp.
struct Reader {
  u32 at[2];  // of its windows: number lane % 16 in at[0], or lane / 4 and lane / 4 + 8
  int lane;

  // Of the warp's windows 16 `strip` and on; `place` is where the window of number
  // lane % (16 STRIPS) starts.
  template <int STRIPS>
  DEVICE static Reader of(u32 pixels, int place, int strip, int lane) {
    const int first = 16 * strip;
    if (unit() == 16) {
      const int start = STRIPS > 1 ? shuffle(place, first + lane % 16) : place;
      return {{pixels + start * 16, 0}, lane};
    }
    return {{pixels + shuffle(place, first + lane / 4) * PIXEL,
             pixels + shuffle(place, first + lane / 4 + 8) * PIXEL},
            lane};
  }

  // The fragment of one product.
  DEVICE void read(u32 (&a)[4], int product) const {
    // To keep the addresses of many products in registers costs spills.
    const int t = (products() > 8 ? forget(lane) : lane) % 4;
    if (unit() == 16) {
      const int first = unit_offset(2 * product), second = unit_offset(2 * product + 1);
      const int step = 2 * product + 1 < units() ? second - first : 0;
      load_fragment(a, at[0] + lane / 16 * step + first);
    } else if (unit() == 8) {
      const int offset = unit_offset(4 * product, t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        u32 v[2];
        load_shared2(v, at[h] + offset);
        a[h] = v[0], a[2 + h] = v[1];
      }
    } else {
      const int low = unit_offset(8 * product, t), high = unit_offset(8 * product + 4, t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        a[h] = load_shared(at[h] + low);
        a[2 + h] = load_shared(at[h] + high);
      }
    }
  }
};
