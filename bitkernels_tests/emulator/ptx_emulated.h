// The functions of csrc/cuda/ptx.cuh, by the text of the PTX manual, on emulator::machine.
#pragma once
#include <array>
#include <bit>

#include "machine.h"
#include "types.cuh"

using emulator::machine;

enum Instruction { SHUFFLE = 1, MMA, BAR, WGMMA, WGMMA_FENCE, WGMMA_COMMIT, WGMMA_WAIT };

inline unsigned char* shared_memory() { return machine.shared; }

inline u32 shared_address(const void* p) {
  return static_cast<u32>(static_cast<const unsigned char*>(p) - machine.shared) +
         emulator::SHARED_BASE;
}

inline int thread_index() { return machine.current; }
inline int block_threads() { return machine.threads; }
inline int block_index() { return machine.block; }
inline int block_count() { return machine.blocks; }

inline void sync_some(int id, int count) {
  machine.meet(machine.named[id], count, BAR, [] {});
}
inline void sync_threads() { sync_some(0, machine.threads); }

inline u32 shuffle_xor(u32 value, int mask) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.lane_in[warp][lane] = value;
  machine.meet(machine.warps[warp], 32, SHUFFLE + 256 * mask,
               [warp] { machine.lane_out[warp] = machine.lane_in[warp]; });
  return machine.lane_out[warp][lane ^ mask];
}

inline int popcount(u32 value) { return std::popcount(value); }
inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline u32 float_bits(float x) { return std::bit_cast<u32>(x); }

inline u32 half_bits(float x) { return std::bit_cast<u16>(static_cast<_Float16>(x)); }
inline float half_value(u32 bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<u16>(bits)));
}
inline u32 bfloat_bits(float x) {  // round to nearest even; no NaN in the tests
  const u32 bits = float_bits(x);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline float bfloat_value(u32 bits) { return std::bit_cast<float>(bits << 16); }

template <class T>
T load(const T* p) {
  machine.check(p, sizeof(T), false);
  return *p;
}

template <class T>
void store(T* p, T value) {
  machine.check(p, sizeof(T), true);
  *p = value;
}

inline void store4(void* p, const u32 (&v)[4]) {
  machine.check(p, 16, true);
  memcpy(p, v, 16);
}

inline void load_shared4(u32 (&v)[4], u32 address) { memcpy(v, machine.at(address, 16), 16); }

template <int SIZE>
void copy_async(u32 to, const void* from, bool real) {
  emulator::Copy copy = {to, SIZE, false, {}};
  machine.at(to, SIZE);
  if (real) {
    machine.check(from, SIZE, false);
    memcpy(copy.data, from, SIZE);
  }
  if (machine.chance(2)) machine.finish_copy(copy);
  machine.groups[machine.current].back().push_back(copy);
}

inline void copy_async_commit() { machine.groups[machine.current].emplace_back(); }

template <int PENDING>
void copy_async_wait() {
  auto& groups = machine.groups[machine.current];
  while (groups.size() > PENDING + 1) {
    for (emulator::Copy& copy : groups.front()) {
      machine.finish_copy(copy);
      machine.waited[machine.current].emplace_back(copy.to, copy.bytes);
    }
    groups.pop_front();
  }
}

// The fragments of mma.m16n8k256 for .b1, by the figures of the PTX manual: register i of A holds
// row lane / 4 + 8 (i & 1) and bits 32 (lane % 4) + 128 (i >> 1); register i of B column lane / 4
// and bits 32 (lane % 4) + 128 i; register i of C row lane / 4 + 8 (i >> 1), column
// 2 (lane % 4) + (i & 1).
inline void mma_and(int (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.fragments[warp][lane] = {a0, a1, a2, a3, b0, b1};
  machine.accumulators[warp][lane] = d;
  machine.meet(machine.warps[warp], 32, MMA, [warp] {
    u32 a[16][8], b[8][8];
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        a[l / 4 + 8 * (i & 1)][l % 4 + 4 * (i >> 1)] = machine.fragments[warp][l][i];
      }
      for (int i = 0; i < 2; ++i) b[l / 4][l % 4 + 4 * i] = machine.fragments[warp][l][4 + i];
    }
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        int sum = 0;
        for (int w = 0; w < 8; ++w) sum += std::popcount(a[row][w] & b[column][w]);
        machine.accumulators[warp][row % 8 * 4 + column / 2][row / 8 * 2 + column % 2] += sum;
      }
    }
  });
}
