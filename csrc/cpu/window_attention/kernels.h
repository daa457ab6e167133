// What the kernels of window attention take and offer: plain structs, no torch, no standard containers.
#pragma once

#include "cpu/builds.h"
#include "cpu/types.h"
#include "cpu/window_plan.h"

namespace swin {

// A call of window attention. Volumes are contiguous (B, D, H, W, channels); `accumulate` below is
// float, or double for kFloat64.
struct AttentionCall {
  const WindowPlan* plan;
  const WindowPattern* patterns;
  int64_t pattern_count;
  const int32_t* windows;  // plan->windows
  int64_t batch, heads, head_dim;
  double scale;
  ElementType type;        // of qkv, pad_qkv, out and their gradients
  ElementType bias_type;   // of the bias table and its gradient: `type` or kFloat32
  const void* qkv;         // (B, *S, 3C)
  const void* bias_table;  // (prod(2w - 1), heads)
  const void* pad_qkv;     // (3C,) or null for zeros
  double dropout_p;
  int64_t seed;
  void* bias_columns;  // (heads, bias_stride) accumulate: see window_group.h
  int64_t bias_stride;
};

// Elements of one head's bias column: the table, a vector that copies may touch, its largest entry.
SWIN_INLINE int64_t bias_stride(const WindowGrid& grid) { return (bias_table_length(grid) + 15) / 16 * 16 + 32; }

struct ForwardCall : AttentionCall {
  void* out;  // (B, *S, C)
  void* lse;  // (B, *S, heads) accumulate, natural logarithm; null where a projected call needs no gradient
};

struct BackwardCall : AttentionCall {
  const void* grad_out;   // (B, *S, C)
  const void* lse;        // (B, *S, heads) accumulate
  void* grad_qkv;         // (B, *S, 3C)
  void* grad_bias_table;  // (prod(2w - 1), heads) in bias_type
  void* grad_pad_qkv;     // (3C,)
  void* bias_partials;    // (chunks, prod(2w - 1)) accumulate
  void* bias_sums;        // (heads, prod(2w - 1)) accumulate
  void* pad_partials;     // (chunks, 2, head_dim) accumulate: keys, values
};

// Windows of one pattern for one head: an item of work. For the backward it owns a partial bias gradient,
// so its size depends on the call alone: sums then have one order for any number of threads.
struct WindowChunk {
  int64_t pattern, head, begin, end;  // [begin, end) of batch × windows of the pattern
};

// Bytes per thread.
SWIN_KERNEL_ALSO_ON_AMX(attention_forward_scratch, size_t(const ForwardCall&));
SWIN_KERNEL(attention_backward_scratch, size_t(const BackwardCall&));
SWIN_KERNEL(prepare_bias, void(const AttentionCall&, WorkCounter&));
SWIN_KERNEL_ALSO_ON_AMX(attention_forward,
                        void(const ForwardCall&, const WindowChunk*, int64_t chunks, void* scratch, WorkCounter&));
SWIN_KERNEL(attention_backward,
            void(const BackwardCall&, const WindowChunk*, int64_t chunks, void* scratch, WorkCounter&));
SWIN_KERNEL(reduce_gradients, void(const BackwardCall&, const WindowChunk*, int64_t chunks, WorkCounter&));

}  // namespace swin
