// The functions of the CUDA driver that the launcher calls, with the prototypes of cuda.h. Each
// checks what it is given and fails with 1 where that is not what a driver would take.
#include <stdint.h>
#include <string.h>

typedef int CUresult;
static int bound;
static uint64_t seen[16];
static const void* const CONTEXT = (void*)0x7fff00000010;
static void* const MODULE = (void*)0x7fff00000020;
static void* const FUNCTION = (void*)0x7fff00000030;

uint64_t stub_seen(int i) { return seen[i]; }

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == 1 ? "invalid argument" : "something else";
  return 0;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}

CUresult cuCtxGetCurrent(void** context) {
  *context = bound ? (void*)CONTEXT : 0;
  return 0;
}

CUresult cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 5;
  return ordinal != 0;
}

CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = (void*)CONTEXT;
  return device != 5;
}

CUresult cuCtxSetCurrent(void* context) {
  bound = context == CONTEXT;
  return !bound;
}

CUresult cuModuleLoadData(void** module, const void* image) {
  *module = MODULE;
  return memcmp(image,
                "\x7f"
                "ELF",
                4) != 0;
}

CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = FUNCTION;
  return module != MODULE || strcmp(name, "bitkernels_kernel");
}

CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
  seen[0] = value;
  return function != FUNCTION || attribute != 8 || value > 227 * 1024;
}

CUresult cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address,
                                const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                                const uint32_t* step, int interleave, int swizzle, int promotion,
                                int fill) {
  if ((uint64_t)map % 64 || type != 0 || rank != 2 || (uint64_t)address % 16) return 1;
  if (stride[0] % 16 || box[0] != 128 || box[1] > 256 || step[0] != 1 || step[1] != 1) return 1;
  if (interleave || swizzle != 3 || promotion > 3 || fill) return 1;
  const uint64_t encoded[] = {(uint64_t)address, size[0], size[1], stride[0], box[1]};
  memcpy(map, encoded, sizeof(encoded));
  return 0;
}

CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                        void** extra) {
  seen[1] = gx;
  seen[2] = bx;
  seen[3] = shared;
  seen[4] = (uint64_t)stream;
  memcpy(&seen[5], params[0], 8);                 // the first pointer of Params
  memcpy(&seen[6], (uint64_t*)params[1] + 4, 8);  // the box height of the first map
  return function != FUNCTION || gy != 1 || gz != 1 || by != 1 || bz != 1 || extra != 0 || !bound;
}
