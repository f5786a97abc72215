// The functions of the CUDA driver that the launcher calls, with the prototypes of cuda.h. Each
// checks what it is given and fails as a driver would: without a context that is current in the
// calling thread, with a function of another context, or with memory that is not there.
#include "tensor_map.h"

enum {
  INVALID = 1,
  NO_CONTEXT = 201,
  INVALID_HANDLE = 400,
  ILLEGAL_ADDRESS = 700,
  CAPTURING = 900
};
enum { DEVICES = 2, DEVICE = 5, FUNCTIONS = 1024, RANGES = 1024, POINTERS = 13, DEPTH = 8 };

typedef int CUresult;
static char contexts[DEVICES];  // their addresses are the handles, as those of the functions
// Each has a module of its own, whose handle is the address of `module`.
static struct {
  const void* context;  // null once the module is unloaded
  int shared, launched;
  char module;
} functions[FUNCTIONS];
static int loaded;
static struct {
  uint64_t begin, end;
} live[RANGES];
static int ranges;
static uint64_t seen[16];
static _Thread_local const char* current;
static _Thread_local const char* pushed[DEPTH];
static _Thread_local int depth, relaxed;
static int capturing;  // a stream of another thread

uint64_t stub_seen(int i) { return seen[i]; }
uint64_t stub_context(void) { return (uint64_t)current; }
void stub_capture(int on) { capturing = on; }
void stub_forget_memory(void) { ranges = 0; }
int stub_memory(uint64_t begin, uint64_t size) {
  if (ranges == RANGES) return INVALID;
  live[ranges].begin = begin;
  live[ranges++].end = begin + size;
  return 0;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == INVALID           ? "invalid argument"
          : error == NO_CONTEXT      ? "invalid device context"
          : error == INVALID_HANDLE  ? "invalid resource handle"
          : error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
                                     : "something else";
  return 0;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13010;
  return 0;
}

CUresult cuCtxGetCurrent(void** context) {
  *context = (void*)current;
  return 0;
}

CUresult cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + DEVICE;
  return ordinal < 0 || ordinal >= DEVICES;
}

CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  if (device < DEVICE || device >= DEVICE + DEVICES) return INVALID;
  *context = contexts + device - DEVICE;
  return 0;
}

CUresult cuCtxSetCurrent(void* context) {
  current = context;
  return current && (current < contexts || current >= contexts + DEVICES);
}

CUresult cuCtxPushCurrent_v2(void* context) {
  if (depth == DEPTH) return INVALID;
  pushed[depth++] = current;
  return cuCtxSetCurrent(context);
}

CUresult cuCtxPopCurrent_v2(void** context) {
  if (!depth) return INVALID;
  *context = (void*)current;
  current = pushed[--depth];
  return 0;
}

CUresult cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = relaxed;
  relaxed = *mode;
  *mode = before;
  return 0;
}

// What a launch left running is over.
CUresult cuCtxSynchronize(void) {
  if (!current) return NO_CONTEXT;
  if (capturing) return CAPTURING;
  for (int i = 0; i < loaded; ++i)
    if (functions[i].context == current) functions[i].launched = 0;
  return 0;
}

CUresult cuModuleLoadData(void** module, const void* image) {
  if (!current) return NO_CONTEXT;
  if (capturing && relaxed != 2) return CAPTURING;
  if (loaded == FUNCTIONS || memcmp(image,
                                    "\x7f"
                                    "ELF",
                                    4))
    return INVALID;
  functions[loaded].context = current;
  functions[loaded].shared = 48 * 1024;  // what a function gets without asking
  *module = &functions[loaded++].module;
  return 0;
}

static int module_of(const void* module) {
  for (int i = 0; i < loaded; ++i)
    if (module == &functions[i].module && functions[i].context == current) return i;
  return -1;
}

CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  if (!current) return NO_CONTEXT;
  const int i = module_of(module);
  if (i < 0) return INVALID_HANDLE;
  if (strcmp(name, "bitkernels_kernel")) return INVALID;
  *function = functions + i;
  return 0;
}

// Refuses what a driver may not notice: a kernel that still runs.
CUresult cuModuleUnload(void* module) {
  if (!current) return NO_CONTEXT;
  const int i = module_of(module);
  if (i < 0) return INVALID_HANDLE;
  if (functions[i].launched) return INVALID;
  functions[i].context = 0;
  ++seen[8];
  return 0;
}

static int index_of(const void* function) {
  for (int i = 0; i < loaded; ++i)
    if (function == functions + i && functions[i].context && functions[i].context == current)
      return i;
  return -1;
}

CUresult cuFuncSetAttribute(void* function, int attribute, int value) {
  if (!current) return NO_CONTEXT;
  const int i = index_of(function);
  if (i < 0) return INVALID_HANDLE;
  if (attribute != 8 || value > 227 * 1024) return INVALID;
  seen[0] = functions[i].shared = value;
  return 0;
}

CUresult cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address,
                                const uint64_t* size, const uint64_t* stride, const uint32_t* box,
                                const uint32_t* step, int interleave, int swizzle, int promotion,
                                int fill) {
  return encode_tiled(map, type, rank, address, size, stride, box, step, interleave, swizzle,
                      promotion, fill);
}

static int is_live(uint64_t address) {
  for (int i = 0; i < ranges; ++i)
    if (live[i].begin <= address && address < live[i].end) return 1;
  return 0;
}

CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                        unsigned by, unsigned bz, unsigned shared, void* stream, void** params,
                        void** extra) {
  if (!current) return NO_CONTEXT;
  const int i = index_of(function);
  if (i < 0) return INVALID_HANDLE;
  if (!gx || gy != 1 || gz != 1 || !bx || bx > 1024 || by != 1 || bz != 1 || extra != 0)
    return INVALID;
  if (shared > (unsigned)functions[i].shared) return INVALID;
  uint64_t pointers[POINTERS];  // which Params begins with
  memcpy(pointers, params[0], sizeof(pointers));
  for (int p = 0; p < POINTERS; ++p)
    if (pointers[p] && !is_live(pointers[p])) return ILLEGAL_ADDRESS;
  functions[i].launched = 1;
  seen[1] = gx;
  seen[2] = bx;
  seen[3] = shared;
  seen[4] = (uint64_t)stream;
  seen[5] = pointers[0];
  ++seen[7];
  return 0;
}

// CUlaunchConfig and CUlaunchAttribute of cuda.h.
struct attribute {
  int id;
  char pad[4];
  union {
    char all[64];
    int allowed;
  } value;
};
struct config {
  unsigned gx, gy, gz, bx, by, bz, shared;
  void* stream;
  struct attribute* attributes;
  unsigned count;
};

// With the one attribute that the launcher knows: the kernel may start before the one before ends.
CUresult cuLaunchKernelEx(const struct config* c, void* function, void** params, void** extra) {
  if (c->count != 1 || c->attributes[0].id != 6 || c->attributes[0].value.allowed != 1)
    return INVALID;
  const CUresult status = cuLaunchKernel(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz,
                                         c->shared, c->stream, params, extra);
  seen[6] += status == 0;
  return status;
}
