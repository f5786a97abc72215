// Fills shared tiles of the two operands by cp.async: windows of the activations as rows of K bits
// (implicit GEMM, nothing is unfolded in global memory), and rows of the filters.
//
// What falls outside an image, past the last row or past the end of K is written as zeros. In the
// and-form zeros add nothing, which makes zero padding exact.
#pragma once
#include "layout.cuh"
#include "ptx.cuh"

// A tile of ROWS by 64 bytes of K, filled by THREADS threads, of which this is number `thread`.
template <int ROWS, int THREADS, int SIZE>
struct Gather {
  static constexpr int BYTES = 64;
  static constexpr int ACROSS = BYTES / SIZE;    // chunks of a row
  static constexpr int STEP = THREADS / ACROSS;  // rows that are filled at once
  static_assert(ROWS % STEP == 0, "every thread fills the same number of chunks");

  // `windows` are the tile's, in shared memory; `k` is the first byte of K.
  DEVICE static void activations(u32 tile, const Window* windows, const Params& p, int k,
                                 int thread) {
    const int byte = thread % ACROSS * SIZE;
    const Chunk chunk = chunk_at(k + byte);
    const unsigned char* words = reinterpret_cast<const unsigned char*>(p.words);
#pragma unroll 4
    for (int i = 0; i < ROWS / STEP; ++i) {
      const int row = thread / ACROSS + i * STEP;
      const Window window = windows[row];
      const bool real = reads(window, chunk);
      copy_async<SIZE>(tile + narrow_offset(row, byte),
                       real ? words + window.base + chunk.distance : words, real);
    }
  }

  DEVICE static void filters(u32 tile, int first, const Params& p, int k, int thread) {
    const int byte = thread % ACROSS * SIZE;
    const unsigned char* words = reinterpret_cast<const unsigned char*>(p.filters);
#pragma unroll 4
    for (int i = 0; i < ROWS / STEP; ++i) {
      const int row = thread / ACROSS + i * STEP;
      const bool real = first + row < COUT && k + byte < K_BYTES;
      const i64 at = static_cast<i64>(first + row) * K_BYTES + k + byte;
      copy_async<SIZE>(tile + narrow_offset(row, byte), real ? words + at : words, real);
    }
  }
};

// Both tiles of one step of K, in chunks of CHUNK bytes.
template <int BM, int BN, int THREADS>
DEVICE void gather_step(u32 a, u32 b, const Window* windows, int first_filter, const Params& p,
                        int k, int thread) {
  if (CHUNK == 16) {
    Gather<BM, THREADS, 16>::activations(a, windows, p, k, thread);
    Gather<BN, THREADS, 16>::filters(b, first_filter, p, k, thread);
  } else if (CHUNK == 8) {
    Gather<BM, THREADS, 8>::activations(a, windows, p, k, thread);
    Gather<BN, THREADS, 8>::filters(b, first_filter, p, k, thread);
  } else {
    Gather<BM, THREADS, 4>::activations(a, windows, p, k, thread);
    Gather<BN, THREADS, 4>::filters(b, first_filter, p, k, thread);
  }
}
