// What the host and every kernel agree on: the arguments of a launch and the names of the types.
//
// The shape of a call is not among the arguments. It is compiled in, as the integer constants of
// "spec.cuh", which the launcher writes (bitkernels/backends/cuda/spec.py lists and explains them).
#pragma once

#ifdef BITKERNELS_EMULATED
#include "host.h"
#else
#define HOST_DEVICE __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define CONSTEXPR constexpr HOST_DEVICE
#endif

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

#include "spec.cuh"

// Mirrored field by field by bitkernels/backends/cuda/spec.py. Absent parts are null.
struct Params {
  const u32* words;    // (images, H, W, PIXEL bytes)
  const u32* filters;  // (COUT, K_BYTES bytes)
  void* out;
  u32* packed;  // (rows, ceil(COUT / 32))
  const void* residual;
  const float* scale;
  const float* bias;
  const float* shift_in;
  const float* slope;
  const float* shift_out;
  const float* sign_shift;
  const int* threshold;  // (2, COUT)
  int* corr;             // (classes, COUT), written by prepare, read by the contraction
  int* pa;               // (rows), likewise; the mma.sync kernels count for themselves
  u64* moments;          // (3, COUT): sums are added, the count is written
  float clamp_min;
  float clamp_max;
  int rows;  // output pixels: images * OH * OW
  int images;
  int settled;  // 1: the kernel before has not written the filters
};

enum Type { NONE = 0, INT32 = 1, FLOAT32 = 2, FLOAT16 = 3, BFLOAT16 = 4, INT16 = 5 };

// CUtensorMap, which only the driver and the hardware look into.
struct alignas(64) TensorMap {
  u64 opaque[16];
};
