// The engine for whole networks by its C interface: results do not depend on who else runs, a
// second run allocates nothing, and broken files are refused. `threads`: only the first.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "bitkernels.h"
#include "sample.h"

namespace {

std::atomic<int64_t> allocations{0};
int failures = 0;

void check(bool good, const char* what) {
  if (good) return;
  ++failures;
  std::printf("FAILED: %s (%s)\n", what, bk_error());
}

}  // namespace

// Every allocation of the engine goes through these; sanitizers have their own.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kCounts = false;
#else
constexpr bool kCounts = true;
void* operator new(size_t size) {
  ++allocations;
  if (void* p = std::malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
void* operator new(size_t size, std::align_val_t align) {
  ++allocations;
  const auto a = static_cast<size_t>(align);
  if (void* p = std::aligned_alloc(a, (size + a - 1) / a * a)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { std::free(p); }
#endif

namespace {

constexpr int64_t kPixels = 3 * 12 * 12;

bk_network* load(const std::string& file) { return bk_load_memory(file.data(), file.size()); }

struct Run {
  std::vector<float> pixels, logits, odds;
  bk_tensor input = {}, outputs[2] = {};

  Run(bk_network* network, int64_t batch, unsigned seed)
      : pixels(batch * kPixels), logits(batch * 10), odds(batch * 10) {
    std::mt19937 random(seed);
    for (float& p : pixels) p = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    input = {pixels.data(), BK_FLOAT32, 4, {batch, 3, 12, 12}, {}};
    for (int i = 0; i < 2; ++i) check(!bk_output(network, i, &input, outputs + i), "bk_output");
    outputs[0].data = logits.data();
    outputs[1].data = odds.data();
  }
  bool run(bk_network* network) { return bk_run(network, &input, outputs) == 0; }
};

void test_threads() {
  bk_network* network =
      load(sample::whole(sample::header_of(sample::network(1)), sample::network(1).tensors));
  check(network != nullptr, "the sample loads");
  if (!network) return;
  std::vector<Run> expected;
  for (int64_t i = 0; i < 4; ++i) {
    expected.emplace_back(network, 1 + i % 2, 40 + i);
    check(expected.back().run(network), "a run");
    float sum = 0;
    for (float odd : expected.back().odds) sum += odd;
    check(std::fabs(sum - static_cast<float>(1 + i % 2)) < 1e-5f, "odds add up to 1");
  }
  for (int threads = 1; threads <= 3; threads += 2) {
    check(!bk_set_threads(threads), "bk_set_threads");
    std::vector<std::thread> users;
    std::atomic<int> wrong{0};
    for (int64_t i = 0; i < 4; ++i)
      users.emplace_back([&, i] {
        Run mine(network, 1 + i % 2, 40 + i);
        for (int k = 0; k < 30; ++k) {
          std::fill(mine.logits.begin(), mine.logits.end(), -1.0f);
          if (!mine.run(network) || mine.logits != expected[i].logits) ++wrong;
        }
      });
    for (std::thread& user : users) user.join();
    check(wrong == 0, "threads that share a network get its results");
  }
  bk_free(network);
}

void test_allocations() {
  bk_network* network =
      load(sample::whole(sample::header_of(sample::network(0)), sample::network(0).tensors));
  check(network != nullptr, "the sample loads");
  if (!network) return;
  for (int threads = 1; threads <= 2; ++threads) {
    check(!bk_set_threads(threads), "bk_set_threads");
    Run one(network, 1, 5), two(network, 2, 6);
    check(one.run(network) && two.run(network), "first runs");
    const int64_t before = allocations;
    for (int i = 0; i < 20; ++i) check(one.run(network) && two.run(network), "later runs");
    check(allocations == before && (allocations > 0) == kCounts, "later runs allocate nothing");
  }
  int count = 0;
  Run run(network, 2, 6), timed(network, 2, 6);
  check(run.run(network) && !bk_step_count(network, &run.input, &count) && count > 5, "steps");
  std::vector<bk_step> steps(count);
  check(!bk_run_timed(network, &timed.input, timed.outputs, steps.data(), count), "a timed run");
  check(timed.logits == run.logits, "a timed run computes the same");
  bool named = false;
  for (const bk_step& s : steps)
    named |= std::string(s.name) == "second" && std::string(s.weight) == "two" &&
             std::string(s.call) == "bitkernels.packed_conv2d.default" && s.seconds > 0;
  check(named, "steps have names, calls and weights");
  int64_t constants = 0, activations = 0;
  check(!bk_memory(network, &run.input, &constants, &activations) && constants > 20000 &&
            activations > 10000 && activations < 200000,
        "bk_memory");
  run.input.sizes[2] = 13;
  check(bk_run(network, &run.input, run.outputs) == 1, "other sizes are refused");
  bk_free(network);
}

// Whatever becomes of the file: a reason, or a network that runs.
int64_t try_file(const std::string& file) {
  // Of its own, so that reading past it is seen.
  std::vector<char> exact(file.begin(), file.end());
  bk_network* network = bk_load_memory(exact.data(), exact.size());
  if (!network) {
    const std::string why = bk_error();
    check(why.size() > 12 && why.size() < 600 && why.find('\n') == std::string::npos, "one line");
    return 0;
  }
  std::vector<bk_tensor> inputs(bk_input_count(network)), outputs(bk_output_count(network));
  std::vector<std::vector<char>> memory;
  bool runs = true;
  const auto give = [&](bk_tensor& t) {
    const int64_t bytes = bk_bytes(&t);
    runs = runs && bytes >= 0 && bytes < 1 << 22;
    memory.emplace_back(runs ? bytes : 0);
    t.data = memory.back().data();
  };
  for (size_t i = 0; i < inputs.size(); ++i) {
    check(!bk_input(network, static_cast<int>(i), &inputs[i]), "bk_input");
    for (int d = 0; d < inputs[i].rank; ++d)
      if (inputs[i].sizes[d] < 0) inputs[i].sizes[d] = 2;
    give(inputs[i]);
  }
  int64_t activations = 0;
  runs = runs && !bk_memory(network, inputs.data(), nullptr, &activations) && activations < 1 << 26;
  for (size_t i = 0; i < outputs.size() && runs; ++i) {
    runs = runs && !bk_output(network, static_cast<int>(i), inputs.data(), &outputs[i]);
    if (runs) give(outputs[i]);
  }
  if (runs) check(!bk_run(network, inputs.data(), outputs.data()), "a network that loads runs");
  bk_free(network);
  return 1;
}

void test_steps_past_the_end() {
  sample::File f;
  const std::string far = ", 1, null, null, 1099511627776";
  f.node("one", "aten.slice.Tensor", sample::at("x") + far);
  f.node("same", "aten.slice.Tensor", sample::at("one") + far);
  f.node("scaled", "aten.mul.Tensor", sample::at("same") + ", " + f.real("factor", {1}));
  const std::string header =
      f.header("['x', {'dtype': 'float32'}, [2, 3], [2, 3]]", "[" + sample::at("scaled") + "]");
  bk_network* network = load(sample::whole(header, f.tensors));
  check(network != nullptr, "slices load");
  if (!network) return;
  float x[] = {1, -2, 3, 4, 5, 6}, y[] = {0, 0};
  bk_tensor input = {x, BK_FLOAT32, 2, {2, 3}, {}}, output = {};
  check(!bk_output(network, 0, &input, &output), "bk_output");
  output.data = y;
  check(!bk_run(network, &input, &output) && y[0] != 0 && y[1] == 4 * y[0], "the first of rows");
  bk_free(network);
}

// Kernels read vectors; of the caller's memory no more than is given.
void test_inputs_of_exact_size() {
  for (const char* shift : {"[20]", "[2, 20, 1, 1]"}) {
    sample::File f;
    f.node("signs", "bitkernels.sign_pack.default",
           sample::at("x") + ", " + sample::at("shift") + ", 1");
    const auto conv = [&](const char* name, const char* words) {
      f.node(name, "bitkernels.packed_conv2d.default",
             sample::at(words) + ", " + f.words(std::string(name) + "_words", {33, 3, 3, 1}) +
                 ", 20, [1, 1], [1, 1, 1, 1], [1, 1], 1",
             "'residual': " + sample::at("residual"));
    };
    conv("one", "signs");
    conv("two", "words");
    const auto input = [](const char* name, const char* type, const std::string& sizes) {
      return std::string("['") + name + "', {'dtype': '" + type + "'}, " + sizes + ", " + sizes +
             "]";
    };
    const std::string inputs = input("x", "float32", "[2, 20, 3, 3]") + ", " +
                               input("shift", "float32", shift) + ", " +
                               input("words", "int32", "[2, 3, 3, 1]") + ", " +
                               input("residual", "float32", "[2, 33, 3, 3]");
    const std::string header =
        f.header(inputs, "[" + sample::at("one") + ", " + sample::at("two") + "]");
    check(try_file(sample::whole(header, f.tensors)) == 1, "inputs of exact size");
  }
}

void test_broken_files() {
  const sample::File f = sample::network(1);
  const std::string header = sample::header_of(f), file = sample::whole(header, f.tensors);
  check(try_file(file) == 1, "the sample is whole");
  std::mt19937 random(3);
  int64_t tried = 0, loaded = 0;
  const auto with = [&](const std::string& broken) {
    ++tried;
    loaded += try_file(broken);
  };
  for (int i = 0; i < 200; ++i)
    check(try_file(file.substr(0, random() % file.size())) == 0, "truncated");
  for (int i = 0; i < 1500; ++i) {  // flipped bits, most of them in the header
    std::string broken = file;
    for (int k = i % 3; k >= 0; --k)
      broken[random() % (i % 5 ? header.size() + 8 : file.size())] ^=
          static_cast<char>(1 << random() % 8);
    with(broken);
  }
  // Each number of the header, replaced.
  const char* planted[] = {"-1",
                           "0",
                           "2",
                           "2147483647",
                           "4611686018427387904",
                           "9223372036854775807",
                           "-9223372036854775808",
                           "1e308",
                           "NaN",
                           "null",
                           "[]",
                           "[[]]",
                           "true"};
  for (size_t i = 0; i < header.size(); ++i) {
    if (header[i] < '0' || header[i] > '9' || (header[i - 1] >= '0' && header[i - 1] <= '9'))
      continue;
    size_t end = i;
    while (header[end] >= '0' && header[end] <= '9') ++end;
    for (int k = 0; k < 3; ++k)
      with(sample::whole(header.substr(0, i) + planted[random() % 13] + header.substr(end),
                         f.tensors));
  }
  // Pieces of the header left out or given twice.
  for (int i = 0; i < 500; ++i) {
    const size_t from = random() % header.size(), length = 1 + random() % 40;
    with(sample::whole(
        header.substr(0, from) + (i % 2 ? header.substr(from, length) + header.substr(from)
                                        : header.substr(std::min(from + length, header.size()))),
        f.tensors));
  }
  with(sample::whole(std::string(100000, '['), ""));
  with(sample::whole("{\"a\":" + std::string(100000, '{'), ""));
  std::printf("%ld broken files, of which %ld are networks still\n", static_cast<long>(tried),
              static_cast<long>(loaded));
}

}  // namespace

int main(int argc, char** argv) {
  std::printf("kernel %s\n", bk_kernel() ? bk_kernel() : bk_error());
  test_threads();
  if (argc < 2 || std::string(argv[1]) != "threads") {
    test_allocations();
    test_steps_past_the_end();
    test_inputs_of_exact_size();
    test_broken_files();
  }
  std::printf("%s\n", failures ? "failed" : "passed");
  return failures ? 1 : 0;
}
