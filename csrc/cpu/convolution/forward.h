// Convolutions of channels-last volumes in float32: 3×3×3 with padding 1, and 1×1×1; stride 1, over one or two sources
// whose channels are taken one after the other, so that a concatenation need not be written.
//
// Along the last axis four outputs are computed from six inputs with six products instead of twelve: F(4, 3) of
// Winograd, "Arithmetic complexity of computations" (1980), in the form of Lavin and Gray,
// https://arxiv.org/abs/1509.09308. Along the other two axes taps are summed as usual: sums over 9 · C products, long
// enough to live in registers. An infinite input turns all outputs that share its tile into NaN.
#pragma once

#include "cpu/convolution/kernels.h"
#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {
namespace convolution {

// Outputs a register tile holds: kTileRows rows of kPanelVectors vectors of channels.
#if defined(__AVX512F__)
constexpr int kTileRows32 = 8;  // 24 of 32 registers
#else
constexpr int kTileRows32 = 4;  // 12 of 16 registers
#endif
constexpr int kPanelVectors = 3;
constexpr int64_t kPanel = kPanelVectors * kLanes<float>;
constexpr int64_t kFrequencies = 6, kOutputs = 4;  // of a Winograd tile

// The polynomials are evaluated at 0, ±kNear, ±kFar and infinity: points that lose half the digits that the usual
// 0, ±1, ±2 do. Per point, the product of its differences from the others.
constexpr double kNear = 0.75, kFar = 1.5, kNear2 = kNear * kNear, kFar2 = kFar * kFar;
constexpr double kPoints[5] = {0, kNear, -kNear, kFar, -kFar};
constexpr double kDenominators[5] = {kNear2 * kFar2, 2 * kNear2 * (kNear2 - kFar2), 2 * kNear2 * (kNear2 - kFar2),
                                     2 * kFar2 * (kFar2 - kNear2), 2 * kFar2 * (kFar2 - kNear2)};

// Rows of `channels` values, `stride` apart, that a product reads.
struct Rows {
  const float* first;
  int64_t stride, channels;
};

// out[r] = Σ over sources and channels of rows[r][c] · weight[c], for kRows rows and kVectors vectors of outputs. Each
// source is summed by itself: several short sums lose fewer digits than a long one.
template <int kRows, int kVectors>
SWIN_ALWAYS_INLINE void multiply_tile(const Rows* sources, int count, int64_t row, const float* weight, float* out) {
  constexpr int64_t kWidth = kVectors * kLanes<float>;
  for (int s = 0; s < count; ++s) {
    const int64_t stride = sources[s].stride;
    const float* x = sources[s].first + row * stride;
    Vec<float> sums[kRows][kVectors] = {};
    for (int64_t c = 0; c < sources[s].channels; ++c, weight += kWidth) {
      Vec<float> w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * kLanes<float>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<float> value = broadcast(x[r * stride + c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] += value * w[v];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* to = out + r * kWidth + v * kLanes<float>;
        store(to, s == 0 ? sums[r][v] : load(to) + sums[r][v]);
      }
    }
  }
}

// The same for any number of rows; out is (rows, kVectors · lanes).
template <int kVectors>
void multiply(const Rows* sources, int count, int64_t rows, const float* weight, float* out) {
  constexpr int64_t kWidth = kVectors * kLanes<float>;
  int64_t row = 0;
  for (; row + kTileRows32 <= rows; row += kTileRows32)
    multiply_tile<kTileRows32, kVectors>(sources, count, row, weight, out + row * kWidth);
  for (; row < rows; ++row) multiply_tile<1, kVectors>(sources, count, row, weight, out + row * kWidth);
}

inline void multiply(const Rows* sources, int count, int64_t rows, const float* weight, int64_t width, float* out) {
  switch (width / kLanes<float>) {
    case 1: return multiply<1>(sources, count, rows, weight, out);
    case 2: return multiply<2>(sources, count, rows, weight, out);
    default: return multiply<3>(sources, count, rows, weight, out);
  }
}

// The output channels that one panel of packed weights serves, from `first` on; `width` is `count` in whole vectors.
struct Panel {
  int64_t first, count, width;
  const float* weight;
};

SWIN_ALWAYS_INLINE Panel panel_of(const ConvolutionCall& call, int64_t index) {
  Panel panel;
  panel.first = index * kPanel;
  panel.count = call.out_channels - panel.first < kPanel ? call.out_channels - panel.first : kPanel;
  panel.width = (panel.count + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
  const int64_t products = call.kernel == 1 ? 1 : 9 * kFrequencies;
  panel.weight = call.packed + products * in_channels(call) * panel.first;
  return panel;
}

SWIN_ALWAYS_INLINE int64_t panels_of(const ConvolutionCall& call) { return (call.out_channels + kPanel - 1) / kPanel; }

// Weights of one panel for one of the 9 taps across, as (frequency, tap, in, width); or (in, width) for 1×1×1.
inline void pack_panel(const ConvolutionCall& call, int64_t item) {
  const int64_t taps = call.kernel == 1 ? 1 : 9, tap = item % taps, in = in_channels(call);
  const Panel panel = panel_of(call, item / taps);
  float* packed = const_cast<float*>(panel.weight) + tap * in * panel.width;
  for (int64_t i = 0; i < in; ++i) {
    for (int64_t o = 0; o < panel.width; ++o, ++packed) {
      const bool real = o < panel.count;
      const float* w =
          call.weight + (real ? (panel.first + o) * call.weight_out_stride : 0) + i * call.weight_in_stride;
      if (call.kernel == 1) {
        *packed = real ? *w : 0;
        continue;
      }
      const float* row = w + (call.flip ? 8 - tap : tap) * 3;
      const double g0 = real ? row[call.flip ? 2 : 0] : 0, g1 = real ? row[1] : 0,
                   g2 = real ? row[call.flip ? 0 : 2] : 0;
      const int64_t stride = 9 * in * panel.width;
      for (int64_t f = 0; f < kFrequencies - 1; ++f)
        packed[f * stride] = static_cast<float>((g0 + kPoints[f] * (g1 + kPoints[f] * g2)) / kDenominators[f]);
      packed[5 * stride] = static_cast<float>(g2);
    }
  }
}

// Inputs of a tile at each frequency, `stride` apart.
SWIN_ALWAYS_INLINE void transform_inputs(const float* const (&x)[kFrequencies], int64_t channels, float* to,
                                         int64_t stride) {
  const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *x4 = x[4], *x5 = x[5];
  float *to0 = to, *to1 = to + stride, *to2 = to1 + stride, *to3 = to2 + stride, *to4 = to3 + stride,
        *to5 = to4 + stride;
  constexpr float kA = kNear, kB = kFar, kA2 = kNear2, kB2 = kFar2;
#pragma GCC ivdep
  for (int64_t c = 0; c < channels; ++c) {
    const float near_even = x4[c] - kB2 * x2[c], near_odd = kA * (x3[c] - kB2 * x1[c]);
    const float far_even = x4[c] - kA2 * x2[c], far_odd = kB * (x3[c] - kA2 * x1[c]);
    to0[c] = x4[c] - (kA2 + kB2) * x2[c] + kA2 * kB2 * x0[c];
    to1[c] = near_even + near_odd;
    to2[c] = near_even - near_odd;
    to3[c] = far_even + far_odd;
    to4[c] = far_even - far_odd;
    to5[c] = x5[c] - (kA2 + kB2) * x3[c] + kA2 * kB2 * x1[c];
  }
}

SWIN_ALWAYS_INLINE int64_t tiles_along(const int64_t (&extent)[kAxes]) { return (extent[2] + kOutputs - 1) / kOutputs; }

// The transformed inputs of output rows [h, h + height) in three neighbouring planes: rows [h - 1, h + height + 1). As
// long as planes are asked for in order, each is transformed only once for all outputs that read it.
class TransformedPlanes {
 public:
  // Channels of a volume whose voxels are `stride` apart.
  struct Source {
    const float* first;
    int64_t stride, channels;
  };

  // Voxels are `channels` apart in `memory`; channels beyond those of the sources keep their initial zeros.
  TransformedPlanes(const int64_t (&extent)[kAxes], int64_t block_height, int64_t channels, float* memory)
      : extent_(extent),
        tiles_(tiles_along(extent)),
        channels_(channels),
        plane_((block_height + 2) * tiles_ * channels),
        planes_(memory),
        zeros_(memory + 3 * kFrequencies * plane_) {
    for (int64_t i = 0; i < size(extent, block_height, channels); ++i) memory[i] = 0;
  }

  static int64_t size(const int64_t (&extent)[kAxes], int64_t block_height, int64_t channels) {
    return (3 * kFrequencies * (block_height + 2) * tiles_along(extent) + 1) * channels;
  }

  // Forgets all planes; from here on they are of rows [h, h + height) of the sources.
  void enter(const Source (&sources)[2], int64_t h, int64_t height) {
    for (int s = 0; s < 2; ++s) sources_[s] = sources[s];
    h_ = h;
    height_ = height;
    for (int64_t& held : held_) held = -1;
  }

  // Plane `plane` of the whole batch at a frequency, (row, tile, channels).
  const float* at(int64_t plane, int64_t frequency) const {
    return planes_ + (plane % 3 * kFrequencies + frequency) * plane_;
  }

  void hold(int64_t plane) {
    if (held_[plane % 3] == plane) return;
    held_[plane % 3] = plane;
    for (int64_t row = 0; row < height_ + 2; ++row) {
      const int64_t h = h_ + row - 1, index = plane * extent_[1] + h;
      const bool outside = h < 0 || h >= extent_[1];
      float* to = planes_ + plane % 3 * kFrequencies * plane_ + row * tiles_ * channels_;
      for (int64_t t = 0; t < tiles_; ++t, to += channels_) {
        float* part = to;
        for (const Source& source : sources_) {
          const float* x[kFrequencies];
          for (int64_t i = 0; i < kFrequencies; ++i) {
            const int64_t w = t * kOutputs + i - 1;
            const bool beyond = outside || w < 0 || w >= extent_[2];
            x[i] = beyond ? zeros_ : source.first + (index * extent_[2] + w) * source.stride;
          }
          transform_inputs(x, source.channels, part, plane_);
          part += source.channels;
        }
      }
    }
  }

 private:
  const int64_t (&extent_)[kAxes];
  int64_t tiles_, channels_, plane_, h_ = 0, height_ = 0;
  int64_t held_[3] = {-1, -1, -1};
  Source sources_[2] = {};
  float* planes_;  // (plane modulo 3, frequency, row, tile, channels)
  float* zeros_;   // (channels)
};

// Blocks of output rows (d, h .. h + height, all of w) for a run of planes, and the memory they are computed in.
class WinogradWorker {
 public:
  WinogradWorker(const ConvolutionCall& call, float* scratch)
      : call_(call),
        in_(in_channels(call)),
        tiles_(tiles_along(call.extent)),
        inputs_(call.extent, call.block_height, in_, scratch),
        products_(scratch + TransformedPlanes::size(call.extent, call.block_height, in_)) {}

  static int64_t scratch(const ConvolutionCall& call) {
    return TransformedPlanes::size(call.extent, call.block_height, in_channels(call)) +
           kFrequencies * call.block_height * tiles_along(call.extent) * kPanel;
  }

  static int64_t blocks(const ConvolutionCall& call) {
    const int64_t planes = call.batch * call.extent[0];
    return (call.extent[1] + call.block_height - 1) / call.block_height *
           ((planes + call.block_planes - 1) / call.block_planes);
  }

  void run(int64_t block) {
    const int64_t across = (call_.extent[1] + call_.block_height - 1) / call_.block_height;
    const int64_t h = block % across * call_.block_height, left = call_.extent[1] - h;
    const int64_t height = left < call_.block_height ? left : call_.block_height;
    inputs_.enter({{call_.source[0], call_.channels[0], call_.channels[0]},
                   {call_.source[1], call_.channels[1], call_.channels[1]}},
                  h, height);
    const int64_t planes = call_.batch * call_.extent[0], begin = block / across * call_.block_planes;
    for (int64_t plane = begin; plane < begin + call_.block_planes && plane < planes; ++plane)
      convolve_rows(plane, h, height);
  }

 private:
  void convolve_rows(int64_t plane, int64_t h, int64_t height) {
    const int64_t d = plane % call_.extent[0];
    // Planes beyond the volume are 0 and left out.
    const int64_t first = d == 0 ? 1 : 0, last = d == call_.extent[0] - 1 ? 1 : 2;
    for (int64_t k = first; k <= last; ++k) inputs_.hold(plane + k - 1);
    for (int64_t p = 0; p < panels_of(call_); ++p) {
      const Panel panel = panel_of(call_, p);
      for (int64_t f = 0; f < kFrequencies; ++f) {
        Rows taps[9];
        int count = 0;
        for (int64_t k = first; k <= last; ++k)
          for (int64_t row = 0; row < 3; ++row)
            taps[count++] = {inputs_.at(plane + k - 1, f) + row * tiles_ * in_, in_, in_};
        multiply(taps, count, height * tiles_, panel.weight + (f * 9 + first * 3) * in_ * panel.width, panel.width,
                 products_ + f * height * tiles_ * panel.width);
      }
      for (int64_t row = 0; row < height; ++row) finish_row(plane * call_.extent[1] + h + row, row, height, panel);
    }
  }

  // The outputs of row `row` of the block, row `index` of all volumes, from its products.
  void finish_row(int64_t index, int64_t row, int64_t height, const Panel& panel) const {
    const int64_t width = call_.extent[2], stride = height * tiles_ * panel.width;
    for (int64_t t = 0; t < tiles_; ++t) {
      const float* p = products_ + (row * tiles_ + t) * panel.width;
      const float *p0 = p, *p1 = p + stride, *p2 = p1 + stride, *p3 = p2 + stride, *p4 = p3 + stride, *p5 = p4 + stride;
      float* y = call_.out + (index * width + t * kOutputs) * call_.out_channels + panel.first;
      const int64_t real = width - t * kOutputs < kOutputs ? width - t * kOutputs : kOutputs;
      float spare[kPanel];
      constexpr float kA = kNear, kB = kFar;
      float *y0 = y, *y1 = real > 1 ? y + call_.out_channels : spare,
            *y2 = real > 2 ? y + 2 * call_.out_channels : spare, *y3 = real > 3 ? y + 3 * call_.out_channels : spare;
#pragma GCC ivdep
      for (int64_t c = 0; c < panel.count; ++c) {
        const float near_sum = p1[c] + p2[c], near_difference = p1[c] - p2[c];
        const float far_sum = p3[c] + p4[c], far_difference = p3[c] - p4[c];
        y0[c] = p0[c] + near_sum + far_sum;
        y1[c] = kA * near_difference + kB * far_difference;
        y2[c] = kA * kA * near_sum + kB * kB * far_sum;
        y3[c] = kA * kA * kA * near_difference + kB * kB * kB * far_difference + p5[c];
      }
    }
  }

  const ConvolutionCall& call_;
  int64_t in_, tiles_;
  TransformedPlanes inputs_;
  float* products_;  // (frequency, row, tile, width)
};

// 1×1×1: a block of voxels times the weights.
class PointwiseWorker {
 public:
  PointwiseWorker(const ConvolutionCall& call, float* scratch) : call_(call), products_(scratch) {}

  static int64_t scratch(const ConvolutionCall& call) { return call.block_height * kPanel; }
  static int64_t voxels(const ConvolutionCall& call) {
    return call.batch * call.extent[0] * call.extent[1] * call.extent[2];
  }
  static int64_t blocks(const ConvolutionCall& call) {
    return (voxels(call) + call.block_height - 1) / call.block_height;
  }

  void run(int64_t block) {
    const int64_t first = block * call_.block_height, left = voxels(call_) - first;
    const int64_t rows = left < call_.block_height ? left : call_.block_height;
    Rows sources[2];
    for (int s = 0; s < 2; ++s)
      sources[s] = {call_.source[s] + first * call_.channels[s], call_.channels[s], call_.channels[s]};
    for (int64_t p = 0; p < panels_of(call_); ++p) {
      const Panel panel = panel_of(call_, p);
      multiply(sources, 2, rows, panel.weight, panel.width, products_);
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = products_ + row * panel.width;
        float* to = call_.out + (first + row) * call_.out_channels + panel.first;
        for (int64_t c = 0; c < panel.count; ++c) to[c] = from[c];
      }
    }
  }

 private:
  const ConvolutionCall& call_;
  float* products_;
};

}  // namespace convolution
}  // namespace SWIN_ISA
}  // namespace swin
