// What the kernels of window attention with its projections inside take and offer; all in float32.
#pragma once

#include "cpu/window_attention/kernels.h"

namespace swin {

// qkv = layer_norm(x) · weightᵀ + bias, with pad_qkv = bias, without ever writing qkv; and the layer after the
// attention.
struct ProjectionInputs {
  const float* x;            // (B, *S, C)
  bool normalize;            // else x is taken as it is
  const float* norm_weight;  // (C,) or null for ones
  const float* norm_bias;    // (C,) or null for zeros
  float norm_eps;
  const float* weight;      // (3C, C)
  const float* bias;        // (3C,) or null for zeros
  const float* out_weight;  // (C, C), or null: no layer after the attention
  const float* out_bias;    // (C,) or null for zeros
};

struct ProjectedForwardCall : ForwardCall, ProjectionInputs {
  float* projected_out;  // out · out_weightᵀ + out_bias, may be `out` itself; not read without out_weight
};

// Gradients of the parameters of a projection, one after the other: weight (3C, C), bias (3C,), the layer norm's
// weight and bias (C,), out_weight (C, C), out_bias (C,).
SWIN_INLINE int64_t projection_parameters(int64_t channels) { return (4 * channels + 6) * channels; }
SWIN_INLINE int64_t output_parameters_begin(int64_t channels) { return (3 * channels + 5) * channels; }

// grad_out is of the layer after the attention where there is one.
struct ProjectedBackwardCall : BackwardCall, ProjectionInputs {
  const float* attended;       // (B, *S, C), the attention's output before that layer; not read without one
  float* grad_x;               // (B, *S, C)
  float* grad_projection;      // (projection_parameters,)
  float* projection_partials;  // (chunks / heads, projection_parameters)
};

// An item of work is a group of windows with all their heads, which are consecutive chunks.
SWIN_KERNEL_ALSO_ON_AMX(projects_forward, bool(const AttentionCall&));  // whether there is a kernel for the call
SWIN_KERNEL(projects_backward, bool(const AttentionCall&));
SWIN_KERNEL_ALSO_ON_AMX(projected_forward_scratch, size_t(const ProjectedForwardCall&));
SWIN_KERNEL_ALSO_ON_AMX(projected_forward, void(const ProjectedForwardCall&, const WindowChunk*, int64_t chunks,
                                                void* scratch, WorkCounter&));
SWIN_KERNEL(projected_backward_scratch, size_t(const ProjectedBackwardCall&));
SWIN_KERNEL(projected_backward,
            void(const ProjectedBackwardCall&, const WindowChunk*, int64_t chunks, void* scratch, WorkCounter&));
SWIN_KERNEL(reduce_projected_gradients,
            void(const ProjectedBackwardCall&, const WindowChunk*, int64_t chunks, WorkCounter&));

}  // namespace swin
