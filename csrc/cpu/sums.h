// Sums over everything but the channels, of `kinds` numbers an element, taken beside elementwise
// work on (outer, channels, inner).
#pragma once
#include <memory>

#include "tasks.h"

namespace bitkernels {

// Rows are added up in the arithmetic's own type for a step, then in double for a part of one step
// or several, then part after part: an order that knows no threads. Of a plane a step is kElements.
struct Sums {
  int64_t outer, channels, inner, kinds;

  // A part leaves a double a channel for others to read. Of 64 rows these cost little beside the
  // rows, however many the channels are (20,000 took 1.2 to 1.4 times as long as 512 by 16 rows,
  // 1.0 to 1.2 by 64).
  static constexpr int64_t kLeastRows = 64, kMostParts = 256;
  // Threads without a part take a share of another's channels, which have to be many: rows that are
  // read in runs of 8192 channels cost a fifth more, in runs of 1024 up to twice as much.
  static constexpr int64_t kLeastShare = 4096;

  int64_t step() const {  // of about the same size each
    const int64_t most = std::max(kLeastRows, kElements / channels);
    return std::max<int64_t>(1, ceil_div(outer, std::max<int64_t>(1, ceil_div(outer, most))));
  }
  int64_t part() const {
    return step() * std::max<int64_t>(1, ceil_div(ceil_div(outer, step()), kMostParts));
  }

  // f(first row, rows, first channel, channels, W sums[kinds][channels]) adds to the sums.
  // total: (kinds, channels).
  template <class W, class F>
  void rows(const F& f, double* total) const {
    const int64_t parts = ceil_div(outer, part());
    const int64_t shares = std::min(ceil_div(parallel_threads(), std::max<int64_t>(1, parts)),
                                    ceil_div(channels, kLeastShare));
    const int64_t width = ceil_div(channels, shares);
    std::unique_ptr<double[]> partial(new double[parts * kinds * channels]);
    parallel_for(parts * shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t p = task / shares, c = task % shares * width;
        double* sums = partial.get() + p * kinds * channels;
        add_part<W>(f, p, c, std::min(width, channels - c), sums + c);
      }
    });
    add_up(partial.get(), parts, total);
  }

  // f(first element, elements, channel, W sums[kinds][16]) adds to the sums; lanes are arbitrary.
  template <class W, class F>
  void planes(const F& f, double* total) const {
    std::unique_ptr<double[]> partial(new double[outer * kinds * channels]);
    parallel_for(outer * channels, 1 + kElements / std::max<int64_t>(inner, 1),
                 [&](int64_t begin, int64_t end) {
                   std::vector<W> lanes(16 * kinds);
                   std::vector<double> sums(kinds);
                   for (int64_t t = begin; t < end; ++t) {
                     const int64_t c = t % channels;
                     std::fill(sums.begin(), sums.end(), 0.0);
                     for (int64_t i = 0; i < inner; i += kElements) {
                       std::fill(lanes.begin(), lanes.end(), W(0));
                       f(t * inner + i, std::min(kElements, inner - i), c, lanes.data());
                       for (int64_t j = 0; j < 16 * kinds; ++j) sums[j / 16] += lanes[j];
                     }
                     for (int64_t k = 0; k < kinds; ++k)
                       partial[(t / channels * kinds + k) * channels + c] = sums[k];
                   }
                 });
    add_up(partial.get(), outer, total);
  }

 private:
  // partial: (parts, kinds, channels).
  void add_up(const double* partial, int64_t parts, double* total) const {
    std::fill(total, total + kinds * channels, 0.0);
    parallel_for(channels, 1 + kElements / std::max<int64_t>(parts, 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t p = 0; p < parts; ++p)
                     for (int64_t k = 0; k < kinds; ++k)
                       for (int64_t c = begin; c < end; ++c)
                         total[k * channels + c] += partial[(p * kinds + k) * channels + c];
                 });
  }

  // Writes the sums of a part's rows, of n channels from c on.
  template <class W, class F>
  void add_part(const F& f, int64_t p, int64_t c, int64_t n, double* sums) const {
    const int64_t begin = p * part(), end = std::min(begin + part(), outer);
    std::vector<W> own(kinds * n);
    for (int64_t row = begin; row < end; row += step()) {
      std::fill(own.begin(), own.end(), W(0));
      f(row, std::min(step(), end - row), c, n, own.data());
      for (int64_t k = 0; k < kinds; ++k) {
        double* to = sums + k * channels;
        for (int64_t i = 0; i < n; ++i) to[i] = (row > begin ? to[i] : 0.0) + own[k * n + i];
      }
    }
  }
};

}  // namespace bitkernels
