// Columns of the bias table before the work on windows, and sums of the items' partial gradients after it.
#pragma once

#include <cmath>

#include "cpu/storage.h"
#include "cpu/window_attention/window_group.h"

namespace swin {
namespace SWIN_ISA {
namespace window_attention {

// A head's column of the bias table, as window_group.h describes it.
template <class T>
void fill_bias_column(const AttentionCall& call, int64_t head) {
  const int64_t length = bias_table_length(call.plan->grid);
  T* column = bias_column<T>(call, head);
  T largest = -static_cast<T>(INFINITY), largest_size = 0, not_finite = 0;
  for (int64_t i = 0; i < length; ++i) {
    T* entry = column + length - 1 - i;
    load_row(at(call.bias_table, call.bias_type, i * call.heads + head), call.bias_type, 1, entry);
    *entry *= static_cast<T>(kLog2E);
    largest = *entry > largest ? *entry : largest;
    largest_size = std::abs(*entry) > largest_size ? std::abs(*entry) : largest_size;
    not_finite += *entry * 0;
  }
  for (int64_t i = length; i < call.bias_stride; ++i) column[i] = 0;
  column[call.bias_stride - 2] = largest_size + not_finite;
  column[call.bias_stride - 1] = largest + not_finite;
}

// Adds the partial bias gradients of a head's chunks, in order, to the table.
template <class T>
void reduce_bias(const BackwardCall& call, const WindowChunk* chunks, int64_t count, int64_t head) {
  const int64_t length = bias_table_length(call.plan->grid);
  T* sums = static_cast<T*>(call.bias_sums) + head * length;
  for (int64_t i = 0; i < length; ++i) sums[i] = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (chunks[c].head != head) continue;
    const T* partial = static_cast<const T*>(call.bias_partials) + c * length;
    for (int64_t i = 0; i < length; ++i) sums[i] += partial[i];
  }
  for (int64_t i = 0; i < length; ++i)
    store_row(sums + i, T(1), call.bias_type, 1, at(call.grad_bias_table, call.bias_type, i * call.heads + head));
}

// The same for the keys and values of padding tokens.
template <class T>
void reduce_padding(const BackwardCall& call, const WindowChunk* chunks, int64_t count, int64_t head) {
  const int64_t head_dim = call.head_dim;
  const T zero = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    T grad_key = 0, grad_value = 0;
    for (int64_t c = 0; c < count; ++c) {
      if (chunks[c].head != head) continue;
      const T* partial = static_cast<const T*>(call.pad_partials) + c * 2 * head_dim;
      grad_key += partial[d];
      grad_value += partial[head_dim + d];
    }
    const int64_t channel = head * head_dim + d, channels = call.heads * head_dim;
    store_row(&zero, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, channel));
    store_row(&grad_key, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, channels + channel));
    store_row(&grad_value, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, 2 * channels + channel));
  }
}

}  // namespace window_attention
}  // namespace SWIN_ISA
}  // namespace swin
