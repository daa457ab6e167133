// Gradients of shifted-window attention; docs/cuda.md derives the passes and their floor.
//
// With s = scale q.k + bias + mask, for every window and head:
//
//   p  = exp(s - lse)            from the stored log-sum-exp of the forward
//   dp = grad_out . v            delta = sum over keys of p dp / sum over keys of p = grad_out . out
//   ds = p (dp - delta)
//   dq = scale sum_keys ds k     dk = scale sum_queries ds q     dv = sum_queries p grad_out
//   gradient of the bias table = sum of ds over windows and over the pairs of tokens that share an entry
//
// Passes: 1. `find_tokens`, `prepare_bias`, `prepare_rows`: where tokens lie, bias tiles in the order of fragments, lse
// and delta of each query by window; delta of 16-bit tensors by `find_delta`, from the scores: where one key has nearly
// all the weight, dp - delta of a rounded output is nothing but that rounding. 2. `differentiate_qkv`: a block owns a
// head and takes one window after another.
// 3. `differentiate_bias`: a block owns one head and one tile of queries x keys, in all windows. 4. Sums in a fixed
// order. Passes 2 and 3 both compute p again: on a multiprocessor the n x n bias gradient of a head leaves no room for
// anything else, and writing ds to memory would cost more than the second exponential. float32 has its own kernels for
// 2 and 3, which multiply in true float32. Nothing is accumulated by atomics; results repeat bit for bit.
//
// window_attention_backward_half.cu has the kernels of passes 1 to 3 for 16-bit tensors, ..._float.cu those for
// float32, and window_attention_backward.cu the sums of pass 4 and the launchers.
#pragma once

#include "cuda/windows.h"

namespace swin {

struct BackwardCall : Windows {
  bool has_padding;
  const void *grad_out, *out;
  const float* lse;
  void *grad_qkv, *grad_bias_table, *grad_pad_qkv;

  // Workspace
  uint4* tiles;        // (2, heads, padded / 16, padded / 16, 32): see prepare_bias
  float2* rows;        // (windows, heads, padded): lse and -delta, see prepare_rows
  float* planes;       // (heads, parts, padded, padded): bias gradient before reduction
  float* pad_parts;    // (pad_rows, 2C): gradient of k and v of padding tokens before reduction
  float* grad_q_part;  // (windows, heads, padded, head_dim): between blocks of keys
  int parts, pad_rows;
};

// How one call is cut; everything follows from the call, the device and an override.
struct BackwardPlan : SwinBackwardCut {
  int key_blocks;
  int64_t qkv_shared;
  int row_blocks;                                  // differentiate_rows_float
  int64_t bias_tiles, bias_shared, bias_resident;  // the last: blocks that a multiprocessor holds
  int64_t delta_tiles, delta_parts;                // of find_delta, whose blocks are as large
  int pad_rows;
};

// How the kernels for 16-bit tensors, or those for float32 ones, cut a call. What `asked` sets is taken as it is; the
// caller does so for parts. Returns nullptr, or why the kernels cannot run.
const char* cut_half(const DeviceLimits& limits, const SwinBackwardCut& asked, const Windows& call, BackwardPlan* plan);
const char* cut_float(const Windows& call, BackwardPlan* plan);

// Launch passes 1 to 3, after find_tokens, for a call that has windows.
const char* differentiate_bfloat16(const BackwardCall& call, const BackwardPlan& plan, void* stream);
const char* differentiate_float16(const BackwardCall& call, const BackwardPlan& plan, void* stream);
const char* differentiate_float(const BackwardCall& call, const BackwardPlan& plan, void* stream);

namespace {

// Sum of the products of four float32.
SWIN_DEVICE float dot_of(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
  SWIN_UNROLL
  for (int i = 0; i < 4; ++i) sum = fmaf(float_of(x[i]), float_of(y[i]), sum);
  return sum;
}

// Starts to copy lse and -delta of `count` queries, an even number.
SWIN_DEVICE void stage_rows(float2* shared, const float2* rows, int count) {
  SWIN_NO_UNROLL
  for (int i = 2 * static_cast<int>(threadIdx.x); i < count; i += 2 * static_cast<int>(blockDim.x)) {
    cp_async_16(shared + i, rows + i, true);
  }
}

SWIN_DEVICE const float2* rows_of(const BackwardCall& call, int window, int head) {
  return call.rows + (static_cast<int64_t>(window) * call.heads + head) * call.padded;
}

// lse of every query (for 16-bit tensors times log2(e)), and -delta for float32; an infinite lse makes the weights of a
// query without output zero.
template <class T>
__global__ void __launch_bounds__(256) prepare_rows(const BackwardCall call) {
  const int64_t thread = thread_of_grid();
  if (thread >= static_cast<int64_t>(call.windows) * call.padded * call.heads) return;
  const int head = static_cast<int>(thread % call.heads);
  const int t = static_cast<int>(thread / call.heads % call.padded);
  const int64_t window = thread / call.heads / call.padded;
  const uint32_t token = call.tokens[window % call.windows_a_volume * call.padded + t].x;
  float2 row = make_float2(kInfinity, 0);
  if (token < kPadding) {
    const int64_t position = window / call.windows_a_volume * call.volume_tokens + token;
    const float lse = call.lse[position * call.heads + head];
    if constexpr (sizeof(T) == 2) {
      row.x = lse * kLog2E;
    } else {
      const int64_t at = (position * call.heads + head) * call.head_dim;
      const uint4* out = reinterpret_cast<const uint4*>(static_cast<const T*>(call.out) + at);
      const uint4* grad = reinterpret_cast<const uint4*>(static_cast<const T*>(call.grad_out) + at);
      float delta = 0;
      SWIN_NO_UNROLL
      for (int piece = 0; piece < call.head_dim / 4; ++piece) delta += dot_of(out[piece], grad[piece]);
      row = make_float2(lse, -delta);
    }
  }
  call.rows[(window * call.heads + head) * call.padded + t] = row;
}

template <class T>
const char* launch_prepare_rows(const BackwardCall& call, void* stream) {
  const int64_t threads = static_cast<int64_t>(call.windows) * call.padded * call.heads;
  return launch(prepare_rows<T>, blocks_of(divide_up(threads, 256)), 256, 0, stream, call);
}

}  // namespace
}  // namespace swin
