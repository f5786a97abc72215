// The functions of csrc/cuda/ptx.cuh, by the text of the PTX manual, on emulator::machine.
#pragma once
#include <array>
#include <bit>
#include <cmath>

#include "machine.h"
#include "types.cuh"

using emulator::machine;

enum Instruction {
  SHUFFLE = 1,
  MMA,
  BAR,
  BAR_ANY,
  WGMMA,
  WGMMA_FENCE,
  WGMMA_COMMIT,
  WGMMA_WAIT,
  VOTE,
  FRAGMENT,
  SYNC_WARP,
  ELECT,
  PREDICATE
};

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
  machine.bar(id, count, BAR, true, [] {});
}
inline void sync_if(bool real, int id, int count) {
  machine.whole_warp(PREDICATE + 256 * real);
  if (real) machine.bar(id, count, BAR, true, [] {});
}
inline void arrive_if(bool real, int id, int count) {
  machine.whole_warp(PREDICATE + 256 * (2 + real));
  if (real) machine.bar(id, count, BAR, false, [] {});
}
inline void sync_threads() {
  machine.bar(0, 0, BAR, true, [] {});
}
inline bool sync_threads_any(bool x) {
  machine.any |= x;
  machine.bar(0, 0, BAR_ANY, true, [] { machine.found_any = machine.any, machine.any = false; });
  return machine.found_any;
}

inline u32 shuffle_xor(u32 value, int mask) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.lane_in[warp][lane] = value;
  machine.meet(machine.warps[warp], 32, SHUFFLE + 256 * mask,
               [warp] { machine.lane_out[warp] = machine.lane_in[warp]; });
  return machine.lane_out[warp][lane ^ mask];
}

inline u32 shuffle(u32 value, int from) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.lane_in[warp][lane] = value;
  machine.meet(machine.warps[warp], 32, SHUFFLE,
               [warp] { machine.lane_out[warp] = machine.lane_in[warp]; });
  return machine.lane_out[warp][from];
}

inline u32 ballot(bool x) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.lane_in[warp][lane] = x;
  machine.meet(machine.warps[warp], 32, VOTE + 256, [warp] {
    u32 all = 0;
    for (int l = 0; l < 32; ++l) all |= machine.lane_in[warp][l] << l;
    machine.lane_out[warp].fill(all);
  });
  return machine.lane_out[warp][lane];
}

inline bool any_lane(bool x) {
  const int warp = machine.current / 32;
  machine.lane_in[warp][machine.current % 32] = x;
  machine.meet(machine.warps[warp], 32, VOTE, [warp] {
    u32 any = 0;
    for (u32 lane : machine.lane_in[warp]) any |= lane;
    machine.lane_out[warp].fill(any);
  });
  return machine.lane_out[warp][machine.current % 32];
}

inline int forget(int x) { return x; }
inline int popcount(u32 value) { return std::popcount(value); }
inline u32 funnel(u32 word, u32 value) { return word << 1 | value >> 31; }
inline u32 permute(u32 a, u32 b, u32 order) {
  const u64 bytes = static_cast<u64>(b) << 32 | a;
  u32 found = 0;
  for (int i = 0; i < 4; ++i) {
    found |= static_cast<u32>(bytes >> (order >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  }
  return found;
}
inline u32 sign_bytes(u32 a, u32 b) {
  u32 bytes = 0;
  for (int i = 0; i < 4; ++i) {
    if ((i < 2 ? a : b) >> (i % 2 * 16 + 15) & 1) bytes |= 0xFFu << 8 * i;
  }
  return bytes;
}
// A NaN of the hardware is positive.
inline float add(float a, float b) {
  const float sum = a + b;
  return sum == sum ? sum : std::bit_cast<float>(0x7FFFFFFFu);
}
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float multiply(float a, float b) { return a * b; }
inline float float_value(u32 bits) { return std::bit_cast<float>(bits); }
inline u32 float_bits(float x) { return std::bit_cast<u32>(x); }

inline u32 half_bits(float x) { return std::bit_cast<u16>(static_cast<_Float16>(x)); }
inline float half_value(u32 bits) {
  return static_cast<float>(std::bit_cast<_Float16>(static_cast<u16>(bits)));
}
inline u32 bfloat_bits(float x) {  // round to nearest even; a NaN is 0x7FFF
  if (x != x) return 0x7FFF;
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
void load2(T (&v)[2], const T* p) {
  machine.check(p, 2 * sizeof(T), false);
  memcpy(v, p, 2 * sizeof(T));
}

inline void load4(u32 (&v)[4], const u32* p) {
  machine.check(p, 16, false);
  memcpy(v, p, 16);
}

inline void store2(void* p, u32 a, u32 b) {
  machine.check(p, 8, true);
  const u32 v[2] = {a, b};
  memcpy(p, v, 8);
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

inline void load_shared2(u32 (&v)[2], u32 address) { memcpy(v, machine.at(address, 8), 8); }

inline u32 load_shared(u32 address) {
  u32 value;
  memcpy(&value, machine.at(address, 4), 4);
  return value;
}

inline void store_shared(u32 address, u32 value) {
  memcpy(machine.at(address, 4), &value, 4);
  machine.own(address, 4);
  machine.waited[machine.current].emplace_back(address, 4);
}

inline void store_shared2(u32 address, u32 a, u32 b) {
  const u32 v[2] = {a, b};
  memcpy(machine.at(address, 8), v, 8);
  machine.own(address, 8);
  machine.waited[machine.current].emplace_back(address, 8);
}

inline void store_shared4(u32 address, const u32 (&v)[4]) {
  memcpy(machine.at(address, 16), v, 16);
  machine.own(address, 16);
  machine.waited[machine.current].emplace_back(address, 16);
}

inline void store_shared_half(u32 address, u32 value) {
  const u16 half = value;
  memcpy(machine.at(address, 2), &half, 2);
  machine.own(address, 2);
  machine.waited[machine.current].emplace_back(address, 2);
}

inline u32 load_shared_half(u32 address) {
  u16 value;
  memcpy(&value, machine.at(address, 2), 2);
  return value;
}

inline void load_fragment(u32 (&v)[4], u32 address) {
  const int lane = machine.current % 32, warp = machine.current / 32;
  machine.at(address, 16);
  machine.lane_in[warp][lane] = address;
  machine.meet(machine.warps[warp], 32, FRAGMENT, [warp] {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {  // matrix i: its rows are at the addresses of lanes 8 i on
        const u32 row = machine.lane_in[warp][8 * i + l / 4];
        memcpy(&machine.fragments[warp][l][i], machine.at(row, 16) + l % 4 * 4, 4);
      }
    }
  });
  for (int i = 0; i < 4; ++i) v[i] = machine.fragments[warp][lane][i];
}

inline void add_global(u64* p, u64 value) {
  machine.check(p, 8, true);
  *p += value;
}

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

template <int SIZE>
void copy_async(u32 to, const void* from) {
  copy_async<SIZE>(to, from, true);
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

// Hopper.

inline void fence_async() {
  for (const auto& [to, bytes] : machine.waited[machine.current]) {
    for (int i = 0; i < bytes; ++i) {
      uint16_t& owner = machine.unfenced[to - emulator::SHARED_BASE + i];
      if (owner == machine.current + 1) owner = 0;
    }
  }
  machine.waited[machine.current].clear();
}

inline emulator::Warpgroup& warpgroup() { return machine.warpgroups[machine.current / 128]; }

// A wait or commit concerns the whole warpgroup, which executes it together.
inline void wgmma_fence() {
  machine.meet(warpgroup().meeting, 128, WGMMA_FENCE, [] { warpgroup().fenced = true; });
}

inline void wgmma_commit() {
  machine.meet(warpgroup().meeting, 128, WGMMA_COMMIT, [] { ++warpgroup().group; });
}

template <int PENDING>
void wgmma_wait() {
  machine.meet(warpgroup().meeting, 128, WGMMA_WAIT + 256 * PENDING, [] {
    emulator::Warpgroup& g = warpgroup();
    while (!g.products.empty() && g.products.front().first < g.group - PENDING) {
      machine.run_product(g);
    }
    if (PENDING == 0) g.fenced = false;
  });
}

template <int N>
void wgmma_queue(int (&d)[N / 8][4], const u32* fragment, u64 a, u64 b, bool accumulate) {
  emulator::Warpgroup& g = warpgroup();
  if (!g.fenced) machine.fail("wgmma without wgmma.fence");
  g.d[machine.current % 128] = &d[0][0];
  g.fragments[machine.current % 128] = fragment;
  machine.meet(g.meeting, 128, WGMMA + 256 * N, [&] {
    emulator::Product product = {N, a, b, accumulate, {}, {}};
    memcpy(product.d, g.d, sizeof(g.d));
    memcpy(product.fragments, g.fragments, sizeof(g.fragments));
    g.products.emplace_back(g.group, product);
  });
}

template <int N>
void wgmma_and(int (&d)[N / 8][4], u64 a, u64 b, bool accumulate) {
  wgmma_queue<N>(d, nullptr, a, b, accumulate);
}

template <int N>
void wgmma_and(int (&d)[N / 8][4], const u32 (&a)[4], u64 b, bool accumulate) {
  wgmma_queue<N>(d, a, 0, b, accumulate);
}

// A block owns what it was launched with; taking more than was given waits.
template <int REGISTERS>
void give_registers() {
  machine.pool += machine.launched_registers() - REGISTERS;
  machine.wake(machine.pool_waiting);
}

template <int REGISTERS>
void take_registers() {
  const int more = REGISTERS - machine.launched_registers();
  while (machine.pool < more) machine.wait(machine.pool_waiting);
  machine.pool -= more;
}

#include "bulk_emulated.h"

inline int uniform(int x) { return x; }
inline bool elected() {
  const int warp = machine.current / 32;
  machine.meet(machine.warps[warp], 32, ELECT,
               [warp] { machine.lane_out[warp].fill(machine.random() % 32); });
  return machine.lane_out[warp][machine.current % 32] == machine.current % 32u;
}
inline void sync_warp() {
  machine.meet(machine.warps[machine.current / 32], 32, SYNC_WARP, [] {});
}

inline int unknown_one() { return 1; }
inline u32 half_pair_bits(float a, float b) { return half_bits(a) | half_bits(b) << 16; }
inline u32 bfloat_pair_bits(float a, float b) { return bfloat_bits(a) | bfloat_bits(b) << 16; }
inline u32 load_if(bool real, const u32* p) { return real ? load(p) : 0; }
inline void load2_if(bool real, u32 (&v)[2], const u32* p) {
  v[0] = v[1] = 0;
  if (real) load2(v, p);
}
inline void store_if(bool real, u32* p, u32 value) {
  if (real) store(p, value);
}
inline void store2_if(bool real, void* p, u32 a, u32 b) {
  if (real) store2(p, a, b);
}
inline void store4_if(bool real, void* p, const u32 (&v)[4]) {
  if (real) store4(p, v);
}
inline void load4_if(bool real, u32 (&v)[4], const void* p) {
  if (real) return load4(v, static_cast<const u32*>(p));
  for (u32& x : v) x = static_cast<u32>(machine.random());
}
inline int load_fresh(const int* p) { return load(p); }
inline void dependency_wait() {
  // The kernel before may end long after this one has begun.
  for (int i = machine.random() % 64; i > 0; --i) machine.pause();
  machine.depended[machine.current] = true;
}
inline void dependents_may_start() {}
