// What the kernels of the convolution take and offer: plain structs, no torch, no standard containers.
#pragma once

#include "cpu/builds.h"
#include "cpu/types.h"
#include "geometry.h"

namespace swin {

// A convolution of contiguous float32 volumes (B, D, H, W, C) with stride 1, padding kernel / 2 and no bias.
struct ConvolutionCall {
  int64_t kernel;  // 3 or 1, on every axis
  int64_t batch, extent[kAxes];
  int64_t channels[2], out_channels;  // the second source may have none
  const float* source[2];
  // The weight of (output channel, input channel, tap) lies at out · weight_out_stride + in · weight_in_stride + tap;
  // under `flip`, which makes the gradient of a source, taps are counted from the last.
  const float* weight;
  int64_t weight_out_stride, weight_in_stride;
  bool flip;
  float* packed;         // memory for packed_weights() elements
  float* out;            // (B, D, H, W, out_channels)
  int64_t block_height;  // rows of a block of outputs; for kernel 1, voxels
  int64_t block_planes;  // planes of the whole batch that a block goes through; not read for kernel 1
};

SWIN_INLINE int64_t in_channels(const ConvolutionCall& call) { return call.channels[0] + call.channels[1]; }

// The gradient of a 3×3×3 weight of such a convolution.
struct WeightGradientCall {
  int64_t batch, extent[kAxes];
  int64_t in_channels, out_channels;
  const float* source;    // (B, D, H, W, in_channels)
  const float* grad_out;  // (B, D, H, W, out_channels)
  int64_t slabs;          // of planes, each with its own sums
  int64_t block_height;   // rows that are worked on at a time
  float* sums;            // (slabs, weight_gradient_sums)
  float* grad_weight;     // (out_channels, in_channels, 3, 3, 3)
};

// Items of pack_weights and blocks of convolve may run in any order; convolve needs all items packed.
SWIN_KERNEL(packed_weights, int64_t(const ConvolutionCall&));  // elements
SWIN_KERNEL(pack_items, int64_t(const ConvolutionCall&));
SWIN_KERNEL(pack_weights, void(const ConvolutionCall&, int64_t item));
SWIN_KERNEL(convolution_scratch, int64_t(const ConvolutionCall&));  // floats per thread
SWIN_KERNEL(convolution_blocks, int64_t(const ConvolutionCall&));
SWIN_KERNEL(convolve, void(const ConvolutionCall&, float* scratch, WorkCounter&));

SWIN_KERNEL(weight_gradient_sums, int64_t(const WeightGradientCall&));     // elements of one slab
SWIN_KERNEL(weight_gradient_scratch, int64_t(const WeightGradientCall&));  // floats per thread
SWIN_KERNEL(weight_gradient_items, int64_t(const WeightGradientCall&));
SWIN_KERNEL(add_weight_gradient, void(const WeightGradientCall&, float* scratch, WorkCounter&));
SWIN_KERNEL(finish_weight_gradient, void(const WeightGradientCall&, int64_t in_channel));

}  // namespace swin
