// What the kernels of instance_norm_act take and offer: plain structs, no torch, no standard containers.
#pragma once

#include "cpu/builds.h"
#include "cpu/types.h"
#include "geometry.h"

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
  void* statistics;      // (B, statistics_rows, C) accumulate: mean, 1 / sqrt(variance + eps); the residual's too
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

// Kernels that take [begin, end) work on those of the batch · blocks blocks; `scratch` holds kNormScratchTensors times
// kNormScratchRows rows of accumulate, one piece for each thread.
SWIN_KERNEL(norm_partials, void(const NormCall&, int64_t begin, int64_t end, void* scratch));
SWIN_KERNEL(norm_statistics, void(const NormCall&));
SWIN_KERNEL(norm_apply, void(const NormCall&, int64_t begin, int64_t end, void* scratch));
SWIN_KERNEL(norm_backward_partials, void(const NormBackwardCall&, int64_t begin, int64_t end, void* scratch));
SWIN_KERNEL(norm_backward_means, void(const NormBackwardCall&));
SWIN_KERNEL(norm_backward_apply, void(const NormBackwardCall&, int64_t begin, int64_t end, void* scratch));

}  // namespace swin
