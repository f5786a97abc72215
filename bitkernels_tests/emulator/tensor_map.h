// Tensor maps: what cuTensorMapEncodeTiled refuses, by the manual of the driver, and what the
// driver stub and the emulator put into one. C and C++.
#pragma once
#include <stdint.h>
#include <string.h>

// Dimensions from the innermost on; `stride` those of the others, in bytes. Those that a map lacks
// have one element.
struct EncodedMap {
  uint64_t base, size[5], stride[4];
  uint16_t box[5];
  uint8_t element, rank, swizzled;
};

// 0, or CUDA_ERROR_INVALID_VALUE. Of the element types UINT8, UINT32 and UINT64, of the rest no
// interleaving, no swizzle or that of 128 bytes, zeros outside.
static int encode_tiled(void* map, int type, uint32_t rank, void* address, const uint64_t* size,
                        const uint64_t* stride, const uint32_t* box, const uint32_t* step,
                        int interleave, int swizzle, int promotion, int fill) {
  enum { INVALID_VALUE = 1 };
  const int element = type == 0 ? 1 : type == 2 ? 4 : type == 4 ? 8 : 0;
  struct EncodedMap encoded;
  memset(&encoded, 0, sizeof(encoded));
  if ((uint64_t)map % 64 || !element || rank < 1 || rank > 5) return INVALID_VALUE;
  if (!address || (uint64_t)address % 16) return INVALID_VALUE;
  if (interleave || (swizzle != 0 && swizzle != 3) || promotion < 0 || promotion > 3 || fill)
    return INVALID_VALUE;
  for (uint32_t i = 0; i < 5; ++i) {
    encoded.size[i] = i < rank ? size[i] : 1;
    encoded.box[i] = i < rank ? box[i] : 1;
    if (i >= rank) continue;
    if (!size[i] || size[i] > 1ull << 32 || !box[i] || box[i] > 256 || step[i] != 1)
      return INVALID_VALUE;
    if (i + 1 == rank) continue;
    if (!stride[i] || stride[i] % 16 || stride[i] >= 1ull << 40) return INVALID_VALUE;
    encoded.stride[i] = stride[i];
  }
  if (box[0] * element % 16 || (swizzle && box[0] * element > 128)) return INVALID_VALUE;
  encoded.base = (uint64_t)address;
  encoded.element = element;
  encoded.rank = rank;
  encoded.swizzled = swizzle == 3;
  memcpy(map, &encoded, sizeof(encoded));
  return 0;
}
