/* Runs a converted network without Python and without LibTorch.
 *
 *   bk_network* network = bk_load("network.safetensors");   written by bitkernels.save_converted
 *   if (!network) return fail(bk_error());
 *   bk_tensor image = {pixels, BK_FLOAT32, 4, {1, 3, 224, 224}, {0}}, logits;
 *   if (bk_output(network, 0, &image, &logits)) return fail(bk_error());
 *   logits.data = malloc(bk_bytes(&logits));
 *   if (bk_run(network, &image, &logits)) return fail(bk_error());
 *   bk_free(network);
 *
 * A network may be used by several threads at once; each run in flight has memory of its own, kept
 * for the next. Functions that return int return 0, or 1 with the reason in bk_error().
 */
#ifndef BITKERNELS_H
#define BITKERNELS_H
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define BK_API __attribute__((visibility("default")))
#else
#define BK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define BK_MAX_RANK 8

typedef enum { BK_FLOAT32 = 0, BK_INT32 = 1, BK_INT64 = 2, BK_BOOL = 3 } bk_dtype;

/* sizes and strides in PyTorch's order (an image is batch, channels, height, width) and in
 * elements, at least 0. Strides that are all 0 mean a dense tensor, last dimension innermost. As an
 * input's description in bk_input a size is -1 where it is free. */
typedef struct {
  void* data;
  int32_t dtype;
  int32_t rank;
  int64_t sizes[BK_MAX_RANK];
  int64_t strides[BK_MAX_RANK];
} bk_tensor;

typedef struct bk_network bk_network;

/* What one step of a network did in bk_run_timed. The strings live as long as the network. */
typedef struct {
  const char* name;   /* the node of the graph, or the last of those that became this step */
  const char* call;   /* its operator, as "bitkernels.packed_conv2d.both" */
  const char* weight; /* the file's tensor with its weight, or "" */
  double seconds;
} bk_step;

/* The reason why the last call in this thread failed; "" before that. */
BK_API const char* bk_error(void);
BK_API const char* bk_version(void);
/* The name of the kernels in use, as "avx512"; NULL where BITKERNELS_CPU names none of this
 * machine. */
BK_API const char* bk_kernel(void);
/* Threads of a run from now on, at least 1. Where LibTorch is the host, its own number rules and
 * this call fails. */
BK_API int bk_set_threads(int count);

/* NULL for a file that cannot be read, is broken, of a later format, or calls what this engine does
 * not have; bk_error() names it. The memory is copied. */
BK_API bk_network* bk_load(const char* path);
BK_API bk_network* bk_load_memory(const void* data, size_t size);
BK_API void bk_free(bk_network* network);

BK_API int bk_input_count(const bk_network* network);
BK_API int bk_output_count(const bk_network* network);
BK_API const char* bk_input_name(const bk_network* network, int index);
BK_API int bk_input(const bk_network* network, int index, bk_tensor* description);
/* dtype, sizes and dense strides of output `index` for these inputs, whose data are not read.
 * Images are channels last: their strides say so. */
BK_API int bk_output(bk_network* network, int index, const bk_tensor* inputs,
                     bk_tensor* description);
BK_API int64_t bk_bytes(const bk_tensor* description);

/* outputs[i] is as bk_output describes it, with data to write to. Nothing is written on failure of
 * the checks. Plans of the last 8 combinations of sizes and strides are kept; what was run before
 * by as many threads at once allocates no memory, but where binary convolutions copy their input:
 * with padding of 1 or -1, and with groups that do not begin at a word. */
BK_API int bk_run(bk_network* network, const bk_tensor* inputs, bk_tensor* outputs);

/* Bytes of constants, and of the activations of one run with these inputs at their peak. */
BK_API int bk_memory(bk_network* network, const bk_tensor* inputs, int64_t* constants,
                     int64_t* activations);
/* Steps of a run with these inputs; then a run that times each: `steps` has `count` entries. */
BK_API int bk_step_count(bk_network* network, const bk_tensor* inputs, int* count);
BK_API int bk_run_timed(bk_network* network, const bk_tensor* inputs, bk_tensor* outputs,
                        bk_step* steps, int count);

#ifdef __cplusplus
}
#endif
#endif
