// The gradient of a 3×3×3 convolution's weight in float32: sums over voxels of outer products of the inputs under the
// kernel and the output's gradient. It uses the transposed form of forward.h's F(4, 3): along the last axis three taps
// are computed from six inputs and four gradients with six products instead of twelve.
//
// Per frequency f and tap across (k, r): M[f][k][r] = Σ over tiles of (inputs at f, shifted by k and r) ⊗ (gradients at
// f); the taps along are sums over f of M, weighted as the weights' transform is.
#pragma once

#include "cpu/convolution/forward.h"
#include "cpu/outer_sum.h"

namespace swin {
namespace SWIN_ISA {
namespace convolution {

SWIN_ALWAYS_INLINE int64_t padded_in(const WeightGradientCall& call) {
  return (call.in_channels + kTileRows32 - 1) / kTileRows32 * kTileRows32;
}

SWIN_ALWAYS_INLINE int64_t padded_out(const WeightGradientCall& call) {
  return (call.out_channels + kLanes<float> - 1) / kLanes<float> * kLanes<float>;
}

// Elements of one slab's sums, (frequency, tap across, padded in, padded out).
SWIN_ALWAYS_INLINE int64_t slab_sums(const WeightGradientCall& call) {
  return kFrequencies * 9 * padded_in(call) * padded_out(call);
}

// Input channels of an item of work.
constexpr int64_t kItemChannels = 48;

// The sums of a slab of planes for kItemChannels input channels.
class WeightGradientWorker {
 public:
  WeightGradientWorker(const WeightGradientCall& call, float* scratch)
      : call_(call),
        tiles_(tiles_along(call.extent)),
        out_(padded_out(call)),
        gradient_plane_(call.block_height * tiles_ * out_),
        inputs_(call.extent, call.block_height, kItemChannels, scratch),
        gradients_(scratch + TransformedPlanes::size(call.extent, call.block_height, kItemChannels)),
        zeros_(gradients_ + kFrequencies * gradient_plane_) {
    for (int64_t i = 0; i < kFrequencies * gradient_plane_ + out_; ++i) gradients_[i] = 0;  // stay beyond the channels
  }

  static int64_t scratch(const WeightGradientCall& call) {
    return TransformedPlanes::size(call.extent, call.block_height, kItemChannels) +
           (kFrequencies * call.block_height * tiles_along(call.extent) + 1) * padded_out(call);
  }

  static int64_t items(const WeightGradientCall& call) { return call.slabs * parts_of(call); }

  void run(int64_t item) {
    const int64_t parts = parts_of(call_), slab = item / parts;
    const int64_t first = item % parts * kItemChannels, left = call_.in_channels - first;
    const int64_t channels = left < kItemChannels ? left : kItemChannels;
    rows_ = (channels + kTileRows32 - 1) / kTileRows32 * kTileRows32;
    sums_ = call_.sums + slab * slab_sums(call_) + first * out_;
    for (int64_t i = 0; i < kFrequencies * 9; ++i)
      for (int64_t j = 0; j < rows_ * out_; ++j) sums_[i * padded_in(call_) * out_ + j] = 0;
    const int64_t planes = call_.batch * call_.extent[0];
    const int64_t begin = planes * slab / call_.slabs, end = planes * (slab + 1) / call_.slabs;
    for (int64_t h = 0; h < call_.extent[1]; h += call_.block_height) {
      const int64_t below = call_.extent[1] - h, height = below < call_.block_height ? below : call_.block_height;
      inputs_.enter({{call_.source + first, call_.in_channels, channels}, {}}, h, height);
      for (int64_t plane = begin; plane < end; ++plane) add_block(plane, h, height);
    }
  }

 private:
  static int64_t parts_of(const WeightGradientCall& call) {
    return (call.in_channels + kItemChannels - 1) / kItemChannels;
  }

  // Rows [h, h + height) of a plane of output gradients, and the inputs under the kernel there.
  void add_block(int64_t plane, int64_t h, int64_t height) {
    const int64_t d = plane % call_.extent[0];
    const int64_t first = d == 0 ? 1 : 0, last = d == call_.extent[0] - 1 ? 1 : 2;  // planes beyond are 0
    for (int64_t k = first; k <= last; ++k) inputs_.hold(plane + k - 1);
    for (int64_t row = 0; row < height; ++row) transform_gradients(plane, h + row, row);
    for (int64_t f = 0; f < kFrequencies; ++f)
      for (int64_t k = first; k <= last; ++k)
        for (int64_t r = 0; r < 3; ++r)
          add_products(inputs_.at(plane + k - 1, f) + r * tiles_ * kItemChannels, gradients_ + f * gradient_plane_,
                       height * tiles_, sums_ + (f * 9 + k * 3 + r) * padded_in(call_) * out_);
  }

  void add_products(const float* inputs, const float* gradients, int64_t count, float* sums) const {
    for (int64_t o = 0; o < out_; o += kPanel) {
      const int64_t vectors = (out_ - o < kPanel ? out_ - o : kPanel) / kLanes<float>;
      for (int64_t c = 0; c < rows_; c += kTileRows32) {
        const float *left = inputs + c, *right = gradients + o;
        float* to = sums + c * out_ + o;
        switch (vectors) {
          case 1: outer_sum_block<float, kTileRows32, 1>(left, kItemChannels, right, out_, count, to, out_); break;
          case 2: outer_sum_block<float, kTileRows32, 2>(left, kItemChannels, right, out_, count, to, out_); break;
          default: outer_sum_block<float, kTileRows32, 3>(left, kItemChannels, right, out_, count, to, out_);
        }
      }
    }
  }

  // The transpose of how outputs are made of products.
  void transform_gradients(int64_t plane, int64_t h, int64_t row) {
    const int64_t width = call_.extent[2], channels = call_.out_channels;
    const float* gradients = call_.grad_out + (plane * call_.extent[1] + h) * width * channels;
    constexpr float kA = kNear, kB = kFar, kA2 = kNear2, kB2 = kFar2;
    for (int64_t t = 0; t < tiles_; ++t) {
      const float* g[kOutputs];
      for (int64_t i = 0; i < kOutputs; ++i)
        g[i] = t * kOutputs + i < width ? gradients + (t * kOutputs + i) * channels : zeros_;
      const float *g0 = g[0], *g1 = g[1], *g2 = g[2], *g3 = g[3];
      float* to = gradients_ + (row * tiles_ + t) * out_;
      float *to0 = to, *to1 = to + gradient_plane_, *to2 = to1 + gradient_plane_, *to3 = to2 + gradient_plane_,
            *to4 = to3 + gradient_plane_, *to5 = to4 + gradient_plane_;
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const float near_even = g0[c] + kA2 * g2[c], near_odd = kA * (g1[c] + kA2 * g3[c]);
        const float far_even = g0[c] + kB2 * g2[c], far_odd = kB * (g1[c] + kB2 * g3[c]);
        to0[c] = g0[c];
        to1[c] = near_even + near_odd;
        to2[c] = near_even - near_odd;
        to3[c] = far_even + far_odd;
        to4[c] = far_even - far_odd;
        to5[c] = g3[c];
      }
    }
  }

  const WeightGradientCall& call_;
  int64_t tiles_, out_, gradient_plane_;
  int64_t rows_ = 0;  // input channels of the item in whole register tiles
  TransformedPlanes inputs_;
  float* gradients_;  // (frequency, row, tile, padded out)
  float* zeros_;      // (padded out)
  float* sums_ = nullptr;
};

// The taps of one input channel from the sums of all slabs.
inline void join_slabs(const WeightGradientCall& call, int64_t in) {
  constexpr int64_t kOut = 64;  // output channels at a time
  const int64_t out = padded_out(call), slab = slab_sums(call);
  for (int64_t first = 0; first < call.out_channels; first += kOut) {
    const int64_t count = call.out_channels - first < kOut ? call.out_channels - first : kOut;
    for (int64_t across = 0; across < 9; ++across) {
      double taps[3][kOut] = {};
      for (int64_t f = 0; f < kFrequencies; ++f) {
        double total[kOut] = {};
        for (int64_t s = 0; s < call.slabs; ++s) {
          const float* sum = call.sums + s * slab + ((f * 9 + across) * padded_in(call) + in) * out + first;
          for (int64_t o = 0; o < count; ++o) total[o] += sum[o];
        }
        const bool infinity = f == kFrequencies - 1;
        const double point = infinity ? 0 : kPoints[f], scale = infinity ? 1 : 1 / kDenominators[f];
        const double factors[3] = {infinity ? 0 : scale, scale * point, infinity ? 1 : scale * point * point};
        for (int t = 0; t < 3; ++t)
          for (int64_t o = 0; o < count; ++o) taps[t][o] += factors[t] * total[o];
      }
      for (int64_t o = 0; o < count; ++o)
        for (int t = 0; t < 3; ++t)
          call.grad_weight[(((first + o) * call.in_channels + in) * 9 + across) * 3 + t] =
              static_cast<float>(taps[t][o]);
    }
  }
}

}  // namespace convolution
}  // namespace SWIN_ISA
}  // namespace swin
