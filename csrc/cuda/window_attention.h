// The launchers of window attention; elements.h says what holds for all.
#pragma once

#include <cstdint>

#include "cuda/elements.h"
#include "geometry.h"

extern "C" {

// One call of windowed attention: B = batch, *S = grid.spatial, C = heads * head_dim, L = prod(2 nominal - 1).
struct SwinAttention {
  SwinElement element;       // of qkv, pad_qkv, out and their gradients
  SwinElement bias_element;  // of bias_table and its gradient: `element` or float32
  int64_t batch;
  int64_t heads;
  int64_t head_dim;
  swin::WindowGrid grid;  // 2D volumes carry a leading axis of extent 1
  double scale;           // factor on q . k
};

struct SwinAttentionForward {
  const void* qkv;         // (B, *S, 3C): q, k, v, then heads, then head_dim
  const void* bias_table;  // (L, heads)
  const void* pad_qkv;     // (3C), qkv of a padding token; null for zeros
  void* out;               // (B, *S, C)
  float* lse;              // (B, *S, heads), log-sum-exp of each score row, natural logarithm
};

struct SwinAttentionBackward {
  const void* grad_out;    // (B, *S, C)
  const void* qkv;         // (B, *S, 3C)
  const void* bias_table;  // (L, heads)
  const void* pad_qkv;     // (3C) or null
  const void* out;         // (B, *S, C), of the forward
  const float* lse;        // (B, *S, heads), of the forward
  void* grad_qkv;          // (B, *S, 3C)
  void* grad_bias_table;   // (L, heads)
  void* grad_pad_qkv;      // (3C); its q part is zero
};

// Why the current device cannot run this call forward (or backward), or nullptr where it can.
const char* swin_cuda_attention_forward_declines(const SwinAttention* call);
const char* swin_cuda_attention_backward_declines(const SwinAttention* call);

// Bytes of scratch memory a call needs, 0 for a declined one. The workspace begins at a multiple of 16 bytes.
int64_t swin_cuda_attention_forward_workspace_bytes(const SwinAttention* call);
int64_t swin_cuda_attention_backward_workspace_bytes(const SwinAttention* call);

const char* swin_cuda_attention_forward(const SwinAttention* call, const SwinAttentionForward* tensors, void* workspace,
                                        void* stream);
const char* swin_cuda_attention_backward(const SwinAttention* call, const SwinAttentionBackward* tensors,
                                         void* workspace, void* stream);

// How the kernels for 16-bit tensors cut a call. In an override, 0 leaves the choice to the kernels.
struct SwinForwardCut {
  int32_t warps;     // of a block, 16 queries each
  int32_t together;  // blocks that a multiprocessor must hold, which bounds the shared memory of each
  int32_t resident;  // 1: the bias of a block lies in shared memory, -1: it is read from memory in every window
  int32_t chunks;    // in which the keys of a window pass by
  int32_t parts;     // that windows are divided into
};

struct SwinBackwardCut {
  int32_t key_warps;    // of a block of differentiate_qkv
  int32_t query_block;  // queries that pass by at a time, a multiple of 16
  int32_t qkv_blocks;   // of each head in differentiate_qkv, among which windows are divided
  int32_t bias_warps;   // of a block of differentiate_bias, 32 queries each
  int32_t parts;        // that windows are divided into in differentiate_bias
};

// Overrides the kernels' choice in the whole process, until a null pointer ends it; for sweeps and tests, while no call
// is running. A call that does not fit the cut, or that is of float32 tensors, is declined; workspace bytes follow the
// cut.
void swin_cuda_override_forward_cut(const SwinForwardCut* cut);
void swin_cuda_override_backward_cut(const SwinBackwardCut* cut);

// Fills `cut` with what a call uses on the current device. Returns nullptr, or why there is none.
const char* swin_cuda_attention_forward_cut(const SwinAttention* call, SwinForwardCut* cut);
const char* swin_cuda_attention_backward_cut(const SwinAttention* call, SwinBackwardCut* cut);
}
