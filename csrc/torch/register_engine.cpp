// The extension itself: Python's entry, torch's threads for the engine, and what it says of its
// kernels. Built on the LibTorch stable ABI, so that one binary serves every torch from 2.11 on.
#include <Python.h>
#include <torch/csrc/stable/ops.h>

#include "box.h"
#include "cpu/parallel.h"
#include "network/threads.h"

namespace bitkernels {

int parallel_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, grain,
                              [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

const char* network::set_threads(int) {
  return "here the threads are those of LibTorch: torch.set_num_threads sets their number";
}

namespace {

const char* const schemas[] = {
#include "operator_schemas.inc"
};

// "name supported" a line, best first.
std::string op_kernels() {
  std::string lines;
  for (int i = 0; i < kKernelCount; ++i)
    lines += text(kKernels[i]->name, " ", kKernels[i]->supported() ? 1 : 0, "\n");
  return lines;
}
std::string op_active() { return kernel().name; }
int64_t op_popcount_loop(int64_t iterations) {
  volatile uint32_t seed = 0x12345678;  // unknown to the compiler, and so is the result
  uint32_t sink = seed;
  const int64_t products = kernel().popcount_loop(iterations, &sink);
  seed = sink;
  return products;
}

}  // namespace

void fail_none(const char* op, int i) {
  const std::string name = op, start = name + "(";
  for (const std::string schema : schemas) {
    if (schema.compare(0, start.size(), start)) continue;
    size_t at = start.size();
    for (; i > 0; --i) {
      at = schema.find(", ", at) + 2;
      if (schema.compare(at, 3, "*, ") == 0) at += 3;
    }
    at = schema.find(' ', at) + 1;
    fail(name.substr(0, name.find('.')).c_str(),
         schema.substr(at, schema.find_first_of(",=)", at) - at).c_str(), "a tensor", "None");
  }
  fail(op, "its argument", "a tensor", "None");
}

}  // namespace bitkernels

STABLE_TORCH_LIBRARY_FRAGMENT(bitkernels, m) {
  m.def("_cpu_kernels() -> str");
  m.def("_cpu_active() -> str");
  m.def("_cpu_popcount_loop(int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(bitkernels, CompositeExplicitAutograd, m) {
  m.impl("_cpu_kernels", TORCH_BOX(&bitkernels::op_kernels));
  m.impl("_cpu_active", TORCH_BOX(&bitkernels::op_active));
  m.impl("_cpu_popcount_loop", TORCH_BOX(&bitkernels::op_popcount_loop));
}

// For a program without Python, whose records define the operators elsewhere: to be called once,
// before a model that calls them is loaded.
extern "C" __attribute__((visibility("default"))) void bitkernels_define_operators(void) {
  using torch::stable::detail::StableLibrary;
  static StableLibrary library(StableLibrary::Kind::FRAGMENT, "bitkernels", nullptr, __FILE__,
                               __LINE__);
  for (const char* schema : bitkernels::schemas) library.def(schema);
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
