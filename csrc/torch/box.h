// TORCH_BOX for an operator's kernel, which also looks for tensors that are None: PyTorch takes
// None for any tensor, and hands it on undefined.
#pragma once
#include <torch/csrc/stable/library.h>

#include <type_traits>

#include "checks.h"

namespace bitkernels {

// Throws the error of argument number i of an operator, by its name with overload.
[[noreturn]] void fail_none(const char* op, int i);  // register_engine.cpp

// Also where that cannot be told: the kernel will say what is wrong.
inline bool is_defined(StableIValue value) {
  bool defined = false;
  const auto tensor = torch::stable::detail::to<AtenTensorHandle>(value);
  return aoti_torch_is_defined(tensor, &defined) != 0 || defined;
}

template <class Function>
struct Arguments;
template <class Result, class... Args>
struct Arguments<Result (*)(Args...)> {
  // The number of the first tensor that is None, or -1.
  static int none(const StableIValue* stack) {
    int found = -1, i = 0;
    const auto look = [&](bool required) {
      if (found < 0 && required && !is_defined(stack[i])) found = i;
      ++i;
    };
    (look(std::is_same_v<std::decay_t<Args>, Tensor>), ...);
    return found;
  }
};

}  // namespace bitkernels

// m.impl(BOX("name", &function)). What is on the stack is the kernel's to free, so it runs anyhow.
#define BOX(name, function)                                                  \
  name, [](StableIValue* stack, uint64_t inputs, uint64_t outputs) {         \
    const int none = bitkernels::Arguments<decltype(function)>::none(stack); \
    if (none < 0) return TORCH_BOX(function)(stack, inputs, outputs);        \
    try {                                                                    \
      TORCH_BOX(function)(stack, inputs, outputs);                           \
    } catch (const std::exception&) {                                        \
    }                                                                        \
    bitkernels::fail_none(name, none);                                       \
  }
