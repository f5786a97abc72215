// Errors of the network engine: one line, thrown as Error, turned into bk_error() by c_api.cpp.
#pragma once
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace bitkernels::network {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Without streams, which are most of a small program's size.
template <class T>
void append(std::string& out, const T& part) {
  if constexpr (std::is_floating_point_v<T>) {
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%g", static_cast<double>(part));
    out += digits;
  } else if constexpr (std::is_arithmetic_v<T>) {
    out += std::to_string(part);
  } else {
    out += part;
  }
}

template <class... Parts>
std::string text(const Parts&... parts) {
  std::string out;
  (append(out, parts), ...);
  return out;
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(text(parts...));
}

// Strings of a file in a message: short, printable, one line.
std::string quoted(const std::string& s);

// Sizes come from files and callers: products and sums past what memory can hold are errors.
constexpr int64_t kMostBytes = int64_t{1} << 46;

inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  if (__builtin_mul_overflow(a, b, &product)) fail("a size is too large: ", a, " times ", b);
  return product;
}
inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  if (__builtin_add_overflow(a, b, &sum)) fail("a size is too large: ", a, " plus ", b);
  return sum;
}

}  // namespace bitkernels::network
