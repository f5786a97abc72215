/* Classifies a picture with a converted network, without Python and without LibTorch.
 *
 *   classify NETWORK.safetensors IMAGE.ppm [--mean R,G,B] [--std R,G,B] [--repeats N] [--threads N]
 *
 * The picture is a binary PPM of the network's size: nothing is resized. Values are divided by 255,
 * then mean (0) is subtracted and std (1) divided by. `make engine` builds it.
 */
#include <bitkernels.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int fail(const char* what) {
  fprintf(stderr, "classify: %s\n", what);
  return 1;
}

static int by_value(const void* a, const void* b) {
  const double x = *(const double*)a, y = *(const double*)b;
  return (x > y) - (x < y);
}

/* A number of the header; comments begin with '#'. -1 for none. */
static int header_number(FILE* file) {
  int c, n = 0, digits = 0;
  while ((c = fgetc(file)) == ' ' || c == '\n' || c == '\r' || c == '\t' || c == '#')
    if (c == '#')
      while ((c = fgetc(file)) != '\n' && c != EOF) {
      }
  for (; c >= '0' && c <= '9' && n < 1000000; c = fgetc(file), ++digits) n = 10 * n + c - '0';
  return digits ? n : -1;
}

/* Pixels as floats, channels innermost; NULL and a message for what is no such picture. */
static float* read_ppm(const char* path, int* height, int* width, const float* mean,
                       const float* std) {
  FILE* file = fopen(path, "rb");
  const char* why = "the image is no binary PPM of 8 bits";
  unsigned char* bytes = NULL;
  float* pixels = NULL;
  if (!file) {
    fail("the image cannot be opened");
    return NULL;
  }
  if (fgetc(file) == 'P' && fgetc(file) == '6' && (*width = header_number(file)) > 0 &&
      (*height = header_number(file)) > 0 && header_number(file) == 255) {
    const size_t count = (size_t)*width * (size_t)*height * 3;
    bytes = malloc(count);
    pixels = malloc(count * sizeof(float));
    why = NULL;
    if (!bytes || !pixels)
      why = "not enough memory for the image";
    else if (fread(bytes, 1, count, file) != count)
      why = "the image ends early";
    for (size_t i = 0; !why && i < count; ++i)
      pixels[i] = ((float)bytes[i] / 255.0f - mean[i % 3]) / std[i % 3];
  }
  free(bytes);
  fclose(file);
  if (!why) return pixels;
  free(pixels);
  fail(why);
  return NULL;
}

static int run(const char* path, const char* picture, const float* mean, const float* std,
               int repeats) {
  const double start = now();
  bk_network* network = bk_load(path);
  const double loaded = now();
  bk_tensor wanted, image = {0}, logits;
  char message[200];
  if (!network) return fail(bk_error());
  if (bk_input_count(network) != 1 || bk_output_count(network) != 1)
    return fail("the network must have one input and one output");
  if (bk_input(network, 0, &wanted)) return fail(bk_error());

  int height = 0, width = 0;
  float* pixels = read_ppm(picture, &height, &width, mean, std);
  if (!pixels) return 1;
  if (wanted.rank != 4 || wanted.sizes[1] != 3 ||
      (wanted.sizes[2] >= 0 && wanted.sizes[2] != height) ||
      (wanted.sizes[3] >= 0 && wanted.sizes[3] != width)) {
    snprintf(message, sizeof(message), "the image is %d high and %d wide; the network takes %d x %d",
             height, width, (int)wanted.sizes[2], (int)wanted.sizes[3]);
    return fail(wanted.rank == 4 && wanted.sizes[1] == 3 ? message
                                                         : "the network takes no color images");
  }
  image.data = pixels;
  image.dtype = BK_FLOAT32;
  image.rank = 4;
  image.sizes[0] = 1, image.sizes[1] = 3, image.sizes[2] = height, image.sizes[3] = width;
  image.strides[0] = (int64_t)height * width * 3, image.strides[1] = 1;
  image.strides[2] = (int64_t)width * 3, image.strides[3] = 3;

  if (bk_output(network, 0, &image, &logits)) return fail(bk_error());
  float* values = malloc((size_t)bk_bytes(&logits) + 1);
  double* times = malloc((size_t)repeats * sizeof(double));
  if (!values || !times) return fail("not enough memory for the result");
  if (logits.dtype != BK_FLOAT32 || logits.rank != 2)
    return fail("the network does not give one row of logits");
  logits.data = values;
  const double first = now();
  if (bk_run(network, &image, &logits)) return fail(bk_error());
  const double ran = now();
  for (int i = 0; i < repeats; ++i) {
    const double before = now();
    if (bk_run(network, &image, &logits)) return fail(bk_error());
    times[i] = now() - before;
  }
  qsort(times, (size_t)repeats, sizeof(double), by_value);

  const int classes = (int)logits.sizes[1];
  for (int k = 0; k < 5 && k < classes; ++k) {
    int best = 0;
    for (int i = 1; i < classes; ++i)
      if (values[i] > values[best]) best = i;
    printf("class %d logit %.7g\n", best, (double)values[best]);
    values[best] = -3.4e38f;
  }
  printf("kernel %s, load %.2f ms, first run %.2f ms", bk_kernel(), 1e3 * (loaded - start),
         1e3 * (ran - first));
  if (repeats) printf(", median of %d runs %.3f ms", repeats, 1e3 * times[repeats / 2]);
  printf("\n");
  free(times);
  free(values);
  free(pixels);
  bk_free(network);
  return 0;
}

int main(int argc, char** argv) {
  float mean[3] = {0, 0, 0}, std[3] = {1, 1, 1};
  const char* files[2];
  int count = 0, repeats = 0;
  for (int i = 1; i < argc; ++i) {
    const char* value = i + 1 < argc ? argv[i + 1] : "";
    float* three = strcmp(argv[i], "--mean") == 0 ? mean : strcmp(argv[i], "--std") == 0 ? std : NULL;
    if (three) {
      if (sscanf(value, "%f,%f,%f", three, three + 1, three + 2) != 3)
        return fail("--mean and --std take three numbers, as 0.5,0.5,0.5");
      ++i;
    } else if (strcmp(argv[i], "--repeats") == 0 || strcmp(argv[i], "--threads") == 0) {
      const int n = atoi(value);
      if (n < 1 || n > 1000000) return fail("--repeats and --threads take a number of at least 1");
      if (argv[i][2] == 'r')
        repeats = n;
      else if (bk_set_threads(n))
        return fail(bk_error());
      ++i;
    } else if (count < 2 && argv[i][0] != '-') {
      files[count++] = argv[i];
    } else {
      return fail("unknown arguments; it takes NETWORK.safetensors IMAGE.ppm [--mean R,G,B] "
                  "[--std R,G,B] [--repeats N] [--threads N]");
    }
  }
  if (count != 2) return fail("it takes NETWORK.safetensors IMAGE.ppm");
  return run(files[0], files[1], mean, std, repeats);
}
