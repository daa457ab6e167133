// What the kernels of every vector width take and offer: plain structs, no torch, no standard containers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "window_plan.h"

namespace swin {

enum class ElementType { kFloat32, kFloat64, kBFloat16, kFloat16 };

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
  void* bias_columns;  // (heads, bias_stride) accumulate: see window_attention.h
  int64_t bias_stride;
};

// Elements of one head's bias column: the table, a vector that copies may touch, its largest entry.
SWIN_INLINE int64_t bias_stride(const WindowGrid& grid) { return (bias_table_length(grid) + 15) / 16 * 16 + 32; }

struct ForwardCall : AttentionCall {
  void* out;  // (B, *S, C)
  void* lse;  // (B, *S, heads) accumulate, natural logarithm; null where a projected call needs no gradient
};

// qkv = layer_norm(x) · weightᵀ + bias, with pad_qkv = bias, where qkv is never written; float32. And the layer after
// the attention.
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

struct PartitionCall {
  const WindowGrid* grid;
  int64_t token_bytes;
  const void* from;
  void* to;
};

// Work is handed out one item at a time; which thread takes an item never changes a result.
using WorkCounter = std::atomic<int64_t>;

// Windows of one pattern for one head: an item of work. For the backward it owns a partial bias gradient,
// so its size depends on the call alone: sums then have one order for any number of threads.
struct WindowChunk {
  int64_t pattern, head, begin, end;  // [begin, end) of batch × windows of the pattern
};

struct KernelTable {
  const char* isa;
  size_t (*attention_scratch)(const AttentionCall&, bool backward);  // bytes per thread
  void (*prepare_bias)(const AttentionCall&, WorkCounter&);
  void (*attention_forward)(const ForwardCall&, const WindowChunk*, int64_t chunks, void* scratch, WorkCounter&);
  void (*attention_backward)(const BackwardCall&, const WindowChunk*, int64_t chunks, void* scratch, WorkCounter&);
  void (*reduce_gradients)(const BackwardCall&, const WindowChunk*, int64_t chunks, WorkCounter&);
  // With the projection inside; an item of work is a group of windows with all their heads, which lie side by side
  // among the chunks.
  bool (*projects)(const AttentionCall&, bool backward);
  size_t (*projected_forward_scratch)(const ProjectedForwardCall&);
  void (*projected_forward)(const ProjectedForwardCall&, const WindowChunk*, int64_t chunks, void* scratch,
                            WorkCounter&);
  size_t (*projected_backward_scratch)(const ProjectedBackwardCall&);
  void (*projected_backward)(const ProjectedBackwardCall&, const WindowChunk*, int64_t chunks, void* scratch,
                             WorkCounter&);
  void (*reduce_projected_gradients)(const ProjectedBackwardCall&, const WindowChunk*, int64_t chunks, WorkCounter&);
};

// The widest build this processor runs, or the one SWIN_KERNELS_ISA names; null and a message if it
// names none that was built and runs here.
const KernelTable* select_kernels(const char** error);

void partition_windows(const PartitionCall&, int64_t begin, int64_t end);  // windows [begin, end)
void reverse_windows(const PartitionCall&, int64_t begin, int64_t end);

}  // namespace swin
