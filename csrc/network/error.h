// Errors of the network engine: one line, thrown as Error, turned into bk_error() by c_api.cpp.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace bitkernels::network {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
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
