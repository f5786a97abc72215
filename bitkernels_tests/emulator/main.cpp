// The kernels, run by the emulator: emulate() is what a launch is on a GPU.
#include "bulk_gemm.cuh"
#include "mma_gemm.cuh"
#include "prepare.cuh"
#include "resident.cuh"
#include "tensor_map.h"

static Params params;
static TensorMap maps[2];

#include <cstddef>

#include "checks.inc"

struct Kernel {
  const char* name;
  void (*run)();
  int (*shared)();  // what the kernel lays out, where that depends on the shape
};

static const Kernel KERNELS[] = {
#include "kernels.inc"
};

extern "C" const char* emulate(const char* name, int grid, int block, int shared, const void* p,
                               const void* tensor_maps, const int* spec,
                               const emulator::Range* ranges, int count, int seed) {
  static std::string error;
  int* const constants[] = {SPEC_CONSTANTS};
  for (size_t i = 0; i < sizeof(constants) / sizeof(*constants); ++i) *constants[i] = spec[i];
  memcpy(&params, p, sizeof(params));
  if (tensor_maps) memcpy(maps, tensor_maps, sizeof(maps));
  machine.ranges.assign(ranges, ranges + count);
  for (const Kernel& kernel : KERNELS) {
    if (strcmp(kernel.name, name)) continue;
    if (kernel.shared && kernel.shared() != shared) return "another layout of shared memory";
    error = machine.run(grid, block, shared, seed, kernel.run);
    return error.empty() ? nullptr : error.c_str();
  }
  return "no such kernel";
}

extern "C" int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address,
                                      const uint64_t* size, const uint64_t* stride,
                                      const uint32_t* box, const uint32_t* step, int interleave,
                                      int swizzle, int promotion, int fill) {
  return encode_tiled(map, type, rank, address, size, stride, box, step, interleave, swizzle,
                      promotion, fill);
}

extern "C" const char* cuGetErrorString(int, const char** text) {
  return *text = "invalid argument", nullptr;
}

extern "C" void set_mutant(int number) { MUTANT = number; }
