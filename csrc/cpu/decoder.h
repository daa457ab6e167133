// What the decoder's kernels of every vector width take and offer: plain structs, no torch, no standard containers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace swin {

// Rows that a kernel holds at once in arithmetic precision where they are stored in another.
constexpr int64_t kNormScratchRows = 16;
constexpr int64_t kNormScratchTensors = 6;

// A call of instance_norm_act on contiguous (B, voxels, C); `accumulate` is float, or double for kFloat64.
struct NormCall {
  int64_t batch, voxels, channels;
  int64_t block_voxels, blocks;  // voxels are worked on in blocks; blocks of one instance
  ElementType type;
  bool normalize_residual;
  double eps, negative_slope;
  const void* x;         // (B, voxels, C); null in a backward that works from the output
  const void* residual;  // (B, voxels, C) or null
  void* y;               // (B, voxels, C); may be x
  void* statistics;      // (B, statistics_rows, C) accumulate: mean, 1 / sqrt(variance + eps); the same of the residual
  void* partials;        // (B · blocks, statistics_rows or gradient_rows, C) accumulate
};

SWIN_INLINE int64_t statistics_rows(const NormCall& call) { return call.normalize_residual ? 4 : 2; }
SWIN_INLINE int64_t gradient_rows(const NormCall& call) { return call.normalize_residual ? 3 : 2; }

struct NormBackwardCall : NormCall {
  const void* output;  // (B, voxels, C): y of the forward
  const void* grad_y;
  void* grad_x;
  void* grad_residual;  // null if there is no residual
  void* means;          // (B, gradient_rows, C) accumulate
};

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
  int64_t block_planes;  // that a block goes through, of the whole batch; for kernel 1 not read
};

SWIN_INLINE int64_t in_channels(const ConvolutionCall& call) { return call.channels[0] + call.channels[1]; }

// The gradient of a 3×3×3 weight of such a convolution.
struct WeightGradientCall {
  int64_t batch, extent[kAxes];
  int64_t in_channels, out_channels;
  const float* source;    // (B, D, H, W, in_channels)
  const float* grad_out;  // (B, D, H, W, out_channels)
  int64_t slabs;          // of planes, with sums of their own
  int64_t block_height;   // rows that are worked on at a time
  float* sums;            // (slabs, weight_gradient_sums)
  float* grad_weight;     // (out_channels, in_channels, 3, 3, 3)
};

// Items of pack_weights and blocks of convolve may run in any order; convolve needs all items packed.
// Functions of [begin, end) of a norm work on those of the batch · blocks blocks; `scratch` holds kNormScratchTensors
// times kNormScratchRows rows of accumulate, one piece for each thread.
struct DecoderKernels {
  const char* isa;
  void (*norm_partials)(const NormCall&, int64_t begin, int64_t end, void* scratch);
  void (*norm_statistics)(const NormCall&);
  void (*norm_apply)(const NormCall&, int64_t begin, int64_t end, void* scratch);
  void (*norm_backward_partials)(const NormBackwardCall&, int64_t begin, int64_t end, void* scratch);
  void (*norm_backward_means)(const NormBackwardCall&);
  void (*norm_backward_apply)(const NormBackwardCall&, int64_t begin, int64_t end, void* scratch);
  int64_t (*packed_weights)(const ConvolutionCall&);  // elements
  int64_t (*pack_items)(const ConvolutionCall&);
  void (*pack_weights)(const ConvolutionCall&, int64_t item);
  int64_t (*convolution_scratch)(const ConvolutionCall&);  // floats per thread
  int64_t (*convolution_blocks)(const ConvolutionCall&);
  void (*convolve)(const ConvolutionCall&, float* scratch, WorkCounter&);
  int64_t (*weight_gradient_sums)(const WeightGradientCall&);     // elements of one slab
  int64_t (*weight_gradient_scratch)(const WeightGradientCall&);  // floats per thread
  int64_t (*weight_gradient_items)(const WeightGradientCall&);
  void (*add_weight_gradient)(const WeightGradientCall&, float* scratch, WorkCounter&);
  void (*finish_weight_gradient)(const WeightGradientCall&, int64_t in_channel);
};

// The decoder's kernels of the build that select_kernels() picks; null and a message as there.
const DecoderKernels* select_decoder_kernels(const char** error);

}  // namespace swin
