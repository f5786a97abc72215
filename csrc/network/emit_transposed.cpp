// The step of packed_conv_transpose2d: one convolution for each phase of the output.
#include <algorithm>

#include "cpu/packed_conv2d.h"
#include "cpu/tile_weight.h"
#include "emit.h"
#include "phases.h"
#include "strided.h"

namespace bitkernels::network {
namespace {

// Filters of a phase, (out_channels, taps of v, taps of h, words), tiled.
const uint32_t* tiles_of(Lowering& low, int weight, const Sizes& f, int64_t groups, const Phase& v,
                         const Phase& h) {
  const int64_t words = f[3], taps = v.taps * h.taps * words, cout = f[0];
  const int64_t bytes = groups * ceil_div(cout / groups, kTile) * kTile * taps * 4;
  const std::string role = text("phase ", v.tap, " ", v.step, " ", h.tap, " ", h.step, " ", groups);
  return static_cast<const uint32_t*>(
      low.constants.made(weight, role.c_str(), bytes, [&](void* to) {
        const auto* from = static_cast<const uint32_t*>(low.constants.raw(weight));
        std::vector<uint32_t> part;
        for (int64_t o = 0; o < cout; ++o)
          for (int64_t y = v.taps - 1; y >= 0; --y)
            for (int64_t x = h.taps - 1; x >= 0; --x) {
              const uint32_t* tap =
                  from + ((o * f[1] + v.tap + y * v.step) * f[2] + h.tap + x * h.step) * words;
              part.insert(part.end(), tap, tap + words);
            }
        tile_weight(part.data(), groups, cout / groups, taps, static_cast<uint32_t*>(to));
      }));
}

struct Part {
  Conv conv;
  int64_t skip_y, skip_x;  // first pixel of the output
};

}  // namespace

void emit_transposed(Lowering& low, const Call& call, int node) {
  const View words = low.dense(low.resolved(call, "words"));
  const View out = low.out(node);
  const Sizes& f = call.tensor("weight_words").sizes;
  const int weight = low.resolved(call, "weight_words").node;
  const int64_t groups = call.integer("groups"), channels = call.integer("channels");
  const auto stride = call.pair("stride", 1), dilation = call.pair("dilation", 1);
  const auto padding = call.pair("padding", 0), more = call.pair("output_padding", 0);
  const int64_t height = words.sizes[1], width = words.sizes[2];
  const Sizes strides = out.strides, size = out.sizes;
  const int64_t pixels = size[0] * size[2] * size[3], cout = f[0];

  std::vector<Part> parts;
  for (const Phase& v : phases(f[1], stride.first, padding.first, more.first, dilation.first))
    for (const Phase& h :
         phases(f[2], stride.second, padding.second, more.second, dilation.second)) {
      if (v.first >= size[2] || h.first >= size[3]) continue;
      // All of it, without what lies before or behind the image, which is no padding: skipped.
      Conv c = {size[0],
                height,
                width,
                groups,
                channels / groups,
                cout / groups,
                v.taps,
                h.taps,
                1,
                1,
                -v.start,
                std::max<int64_t>(v.end, 0),
                -h.start,
                std::max<int64_t>(h.end, 0),
                v.dilation,
                h.dilation,
                (size[2] - v.first - 1) / stride.first + 1,
                (size[3] - h.first - 1) / stride.second + 1,
                0,
                nullptr,
                tiles_of(low, weight, f, groups, v, h)};
      parts.push_back({c, v.first, h.first});
    }
  Epilogue epilogue;
  if (call.given("scale")) epilogue.scale = low.constants.floats(low.resolved(call, "scale").node);
  if (call.given("bias")) epilogue.bias = low.constants.floats(low.resolved(call, "bias").node);
  const bool gaps = pixels > 0 && parts.size() < static_cast<size_t>(stride.first * stride.second);
  const Where in = words.where, to = out.where;
  const Kernel* kernel = &low.kernel;
  low.step(
      node, {words}, {out},
      [=](const Frame& frame) {
        auto* y = frame.at<float>(to);
        if (gaps)  // outputs that see no tap: the epilogue of 0
          for (int64_t i = 0; i < pixels; ++i) {
            float* pixel = y + i / size[3] / size[2] * strides[0] +
                           i / size[3] % size[2] * strides[2] + i % size[3] * strides[3];
            for (int64_t c = 0; c < cout; ++c)
              pixel[c * strides[1]] = (epilogue.scale ? 0.0f * epilogue.scale[c] : 0.0f) +
                                      (epilogue.bias ? epilogue.bias[c] : 0.0f);
          }
        for (const Part& part : parts) {
          Epilogue e = epilogue;
          Conv c = part.conv;
          c.input = frame.at<const uint32_t>(in);
          e.out = y + part.skip_y * strides[2] + part.skip_x * strides[3];
          e.out_channel = strides[1];
          packed_conv2d(
              *kernel, c, e,
              {strides[0], strides[1], stride.first * strides[2], stride.second * strides[3]}, {});
        }
      },
      weight);
}

}  // namespace bitkernels::network
