// The mbarriers and bulk tensor copies of csrc/cuda/ptx.cuh, by the text of the PTX manual.
#pragma once
#include <array>

#include "machine.h"
#include "tensor_map.h"
#include "types.cuh"

using emulator::machine;

inline void barrier_init(u32 barrier, int count) {
  machine.at(barrier, 8);
  machine.barriers[barrier] = {count, count};
}

inline void barrier_init_fence() {}

inline emulator::Barrier& barrier_at(u32 barrier) {
  const auto found = machine.barriers.find(barrier);
  if (found == machine.barriers.end()) machine.fail("an mbarrier that is not initialised");
  return found->second;
}

inline void barrier_arrive(u32 barrier) {
  --barrier_at(barrier).pending;
  machine.complete(barrier_at(barrier));
}

inline void barrier_arrive_expect(u32 barrier, int bytes) {
  if (bytes < 0 || bytes >= 1 << 20) machine.fail("more bytes than an mbarrier counts");
  barrier_at(barrier).transactions += bytes;
  barrier_arrive(barrier);
}

inline void barrier_wait(u32 barrier, int parity) {
  while (barrier_at(barrier).phase == parity) machine.wait(barrier_at(barrier).waiting);
}

inline void prefetch_map(const TensorMap& map) {
  if (reinterpret_cast<uint64_t>(&map) % 64) machine.fail("a misaligned tensor map");
}

// A box lies in shared memory with its innermost dimension first, without gaps; in the swizzle of
// 128 bytes the 16-byte pieces of an address (bits 4 to 6) are xored with bits 7 to 9 of the same
// address. What is outside the tensor is written as zeros, and counted.
inline void copy_box(u32 to, const TensorMap& map, std::array<int, 5> from, int rank, u32 barrier) {
  EncodedMap m;
  memcpy(&m, &map, sizeof(m));
  if (m.rank != rank) machine.fail("a copy of another rank than its map's");
  if (to % 128) machine.fail("a box must start at a multiple of 128");
  if (m.swizzled && to % 1024) machine.fail("a swizzled box must start at a multiple of 1024");
  if (barrier % 8) machine.fail("a misaligned mbarrier");
  const u32 bytes = m.box[0] * m.element;
  const u32 rows = m.box[1] * m.box[2] * m.box[3] * m.box[4];
  // Where each row of the box is in memory, and how much of it is inside.
  struct Row {
    uint64_t address;
    int64_t begin, end;
  };
  std::vector<Row> found(rows);
  for (u32 row = 0; row < rows; ++row) {
    bool inside = true;
    int64_t address = m.base + static_cast<int64_t>(from[0]) * m.element;
    for (u32 i = 1, rest = row; i < 5; rest /= m.box[i], ++i) {
      const int64_t at = static_cast<int64_t>(from[i]) + rest % m.box[i];
      inside = inside && at >= 0 && at < static_cast<int64_t>(m.size[i]);
      address += at * static_cast<int64_t>(m.stride[i - 1]);
    }
    const int64_t left = (static_cast<int64_t>(m.size[0]) - from[0]) * m.element;
    const int64_t begin = std::max<int64_t>(0, -static_cast<int64_t>(from[0]) * m.element);
    found[row] = {static_cast<uint64_t>(address), begin, std::min<int64_t>(bytes, left)};
    if (!inside) found[row].end = begin;
    for (int64_t i = begin; i < found[row].end; ++i) {
      machine.check(reinterpret_cast<const void*>(address + i), 1, false);
    }
  }
  machine.at(to, 16);
  machine.in_flight.push_back([=] {
    for (u32 row = 0; row < rows; ++row) {
      const auto* data = reinterpret_cast<const unsigned char*>(found[row].address);
      for (u32 i = 0; i < bytes; i += 16) {
        u32 address = to + row * bytes + i;
        if (m.swizzled) address ^= (address >> 7 & 7) << 4;
        unsigned char* const at = machine.at(address, 16);
        for (int64_t b = i; b < i + 16; ++b) {
          at[b - i] = b >= found[row].begin && b < found[row].end ? data[b] : 0;
        }
      }
    }
    barrier_at(barrier).transactions -= rows * bytes;
    machine.complete(barrier_at(barrier));
  });
}

inline void copy_bulk(u32 to, const TensorMap& map, int x, int y, u32 barrier) {
  copy_box(to, map, {x, y}, 2, barrier);
}
inline void copy_bulk(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
  copy_box(to, map, {x, y, z}, 3, barrier);
}
inline void copy_bulk(u32 to, const TensorMap& map, int x, int y, int z, int u, int v,
                      u32 barrier) {
  copy_box(to, map, {x, y, z, u, v}, 5, barrier);
}

// From a constant of the module, which no tensor holds and which stays as it is.
inline void copy_bulk(u32 to, const void* from, int bytes, u32 barrier) {
  if (to % 16 || reinterpret_cast<uint64_t>(from) % 16 || bytes % 16 || bytes <= 0) {
    machine.fail("a bulk copy of what is not whole pieces of 16 bytes");
  }
  if (barrier % 8) machine.fail("a misaligned mbarrier");
  const auto* data = static_cast<const unsigned char*>(from);
  const std::vector<unsigned char> held(data, data + bytes);
  for (int i = 0; i < bytes; i += 16) machine.at(to + i, 16);
  machine.in_flight.push_back([=] {
    memcpy(machine.at(to, 16), held.data(), bytes);
    barrier_at(barrier).transactions -= bytes;
    machine.complete(barrier_at(barrier));
  });
}
