// A transposed convolution as ordinary ones, each of one phase of the output: see
// bitkernels/ops/_phases.py, which derives it.
#pragma once
#include <cstdint>
#include <numeric>
#include <vector>

namespace bitkernels::network {

// Along one axis: outputs first, first + stride, ... see the taps tap, tap + step, ... in reverse.
struct Phase {
  int64_t first, tap, step, taps, dilation;
  int64_t start, end;  // the input under the first output's first tap; past that under the last's
                       // last, from the input's end
};

inline std::vector<Phase> phases(int64_t kernel, int64_t stride, int64_t padding,
                                 int64_t output_padding, int64_t dilation) {
  const auto floor_mod = [](int64_t a, int64_t b) { return (a % b + b) % b; };
  const auto floor_div = [&](int64_t a, int64_t b) { return (a - floor_mod(a, b)) / b; };
  const int64_t beyond = dilation * (kernel - 1) + 1 + output_padding - stride - 2 * padding;
  const int64_t g = std::gcd(stride, dilation), step = stride / g, spacing = dilation / g;
  std::vector<Phase> found;
  for (int64_t k = 0; k < std::min(kernel, step); ++k) {
    const int64_t r = floor_mod(k * dilation - padding, stride);
    const int64_t origin = floor_div(r + padding - k * dilation, stride);
    const int64_t taps = (kernel - k + step - 1) / step;
    found.push_back({r, k, step, taps, spacing, origin - (taps - 1) * spacing,
                     floor_div(beyond - r + stride - 1, stride) + origin});
  }
  return found;
}

}  // namespace bitkernels::network
