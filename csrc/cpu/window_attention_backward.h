// Gradients of window attention, scores computed again from the log-sum-exp of the forward.
//
// With p = softmax(scores), w = dropout(p), dw = grad_out vᵀ, and δ = Σ grad_out · out per query:
//   dv = wᵀ grad_out;  ds = p ∘ (dropout'(dw) - δ);  dq = scale · ds k;  dk = scale · dsᵀ q;  dbias = ds.
#pragma once

#include "window_attention.h"

namespace swin {
namespace SWIN_ISA {

template <class T, int kHeadDim>
class BackwardWorker {
 public:
  BackwardWorker(const BackwardCall& call, Arena& arena)
      : call_(call),
        head_(call, arena),
        keys_(arena.take<T>(head_.head_dim() * head_.padded_tokens())),
        values_(arena.take<T>(head_.head_dim() * head_.padded_tokens())),
        key_rows_(arena.take<T>(head_.padded_tokens() * head_.width())),
        grad_keys_(arena.take<T>(head_.padded_tokens() * head_.width())),
        grad_values_(arena.take<T>(head_.padded_tokens() * head_.width())),
        query_rows_(arena.take<T>(kRows * head_.width())),
        grad_rows_(arena.take<T>(kRows * head_.width())),
        out_row_(arena.take<T>(head_.width())),
        queries_(arena.take<T>(kRows * head_.head_dim())),
        grads_(arena.take<T>(kRows * head_.head_dim())),
        weights_(arena.take<T>(kRows * head_.padded_tokens())),
        dropped_(arena.take<T>(kRows * head_.padded_tokens())),
        grad_scores_(arena.take<T>(kRows * head_.padded_tokens())),
        bias_(arena.take<T>(kRows * head_.padded_tokens())),
        sums_(arena.take<T>(kRows * head_.width())),
        grad_bias_(arena.take<T>(head_.tokens() * head_.padded_tokens())) {}

  void run(const GradientChunk* chunks, int64_t count, WorkCounter& next) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) run_chunk(chunks[i], i);
  }

 private:
  void run_chunk(const GradientChunk& chunk, int64_t index) {
    const WindowPattern& pattern = call_.patterns[chunk.pattern];
    T* pad_partial = static_cast<T*>(call_.pad_partials) + index * 2 * head_.head_dim();
    for (int64_t d = 0; d < 2 * head_.head_dim(); ++d) pad_partial[d] = 0;
    for (int64_t i = 0; i < head_.tokens() * head_.padded_tokens(); ++i) grad_bias_[i] = 0;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      const int64_t window = call_.windows[pattern.window_begin + i / call_.batch];
      differentiate(chunk.pattern, window, i % call_.batch, chunk.head, pad_partial);
    }
    gather_bias_gradient(pattern, index);
  }

  void differentiate(int64_t pattern, int64_t window, int64_t batch, int64_t head, T* pad_partial) {
    head_.enter(pattern, window, batch, head);
    head_.pack(1, keys_, key_rows_);
    head_.pack(2, values_, nullptr);
    for (int64_t i = 0; i < head_.padded_tokens() * head_.width(); ++i) grad_keys_[i] = grad_values_[i] = 0;
    const int64_t regions = head_.pattern().region_count;
    if (regions > 1) head_.bound_other_regions(keys_, key_rows_);
    for (int64_t i = 0; i < regions; ++i) {
      const Region region = region_of<T>(head_.pattern(), i);
      head_.for_each_tile(region,
                          [&](const int64_t* queries, int count) { differentiate_tile(region, queries, count, head); });
    }
    store_key_value_gradients(head, pad_partial);
  }

  void differentiate_tile(const Region& region, const int64_t* queries, int count, int64_t head) {
    const int64_t stride = head_.padded_tokens(), width = head_.width(), head_dim = head_.head_dim();
    T offset[kRows], delta[kRows];
    const bool others = load_queries(queries, count, head, offset, delta);
    const int64_t begin = others ? 0 : region.begin, end = others ? stride : region.end;

    const T* bias_rows[kRows];
    if (others)
      head_.whole_bias_rows(queries, bias_, bias_rows);
    else
      head_.own_bias_rows(queries, bias_rows);
    const T label = static_cast<T>(head_.pattern().label[region.first]);
    head_.score(queries_, keys_, bias_rows, label, begin, end, weights_);
    for (int r = 0; r < kRows; ++r) {
      if (r < count)
        exp2_row(weights_ + r * stride, offset[r], begin, end);
      else  // rows beyond the tile's queries must not reach any sum
        for (int64_t k = begin; k < end; ++k) weights_[r * stride + k] = 0;
    }

    const T* used_weights = weights_;
    if (call_.dropout_p > 0) {
      for (int64_t i = count * stride; i < kRows * stride; ++i) dropped_[i] = 0;
      for (int r = 0; r < count; ++r) head_.drop(queries[r], begin, end, weights_ + r * stride, dropped_ + r * stride);
      used_weights = dropped_;
    }
    scatter_rows(used_weights, stride, grad_rows_, width, begin, end, grad_values_);

    score_gradients(queries, count, delta, begin, end);
    scatter_rows(grad_scores_, stride, query_rows_, width, begin, end, grad_keys_);
    weighted_sum(grad_scores_, stride, key_rows_, width, begin, end, sums_);
    for (int r = 0; r < count; ++r) {
      const int64_t token = head_.token(queries[r]);
      store_row(sums_ + r * width, static_cast<T>(call_.scale), call_.type, head_dim,
                at(call_.grad_qkv, call_.type, token * 3 * head_.channels() + head * head_dim));
    }
  }

  // Queries (times scale · log2 e) and output gradients of a tile, as rows and as columns; the
  // log-sum-exp in base 2 and δ of each. Returns whether keys of other regions may matter.
  bool load_queries(const int64_t* queries, int count, int64_t head, T* offset, T* delta) {
    const int64_t width = head_.width(), head_dim = head_.head_dim();
    const T factor = static_cast<T>(call_.scale * kLog2E);
    bool others = false;
    for (int64_t i = 0; i < kRows * width; ++i) query_rows_[i] = grad_rows_[i] = 0;
    for (int r = 0; r < count; ++r) {
      T *query = query_rows_ + r * width, *grad = grad_rows_ + r * width;
      const int64_t token = head_.token(queries[r]);
      const int64_t out_channel = token * head_.channels() + head * head_dim;
      head_.load_part(queries[r], 0, query);
      load_row(at(call_.grad_out, call_.type, out_channel), call_.type, head_dim, grad);
      load_row(at(call_.out, call_.type, out_channel), call_.type, head_dim, out_row_);
      T square = 0, dot = 0;
      for (int64_t d = 0; d < head_dim; ++d) {
        query[d] *= factor;
        square += query[d] * query[d];
        dot += grad[d] * out_row_[d];
      }
      delta[r] = dot;
      offset[r] = static_cast<const T*>(call_.lse)[token * call_.heads + head] * static_cast<T>(kLog2E);
      if (head_.pattern().region_count > 1) others |= head_.others_matter(square, offset[r]);
    }
    for (int r = count; r < kRows; ++r) delta[r] = 0;
    transpose_rows(query_rows_, width, count, head_dim, queries_);
    transpose_rows(grad_rows_, width, count, head_dim, grads_);
    return others;
  }

  // ds of a tile into grad_scores_, added to the bias gradient of its queries.
  void score_gradients(const int64_t* queries, int count, const T* delta, int64_t begin, int64_t end) {
    const int64_t stride = head_.padded_tokens();
    const auto zero = [](int, int64_t) { return Vec<T>{}; };
    if (call_.dropout_p > 0) {
      const auto keep = [&](int r, int64_t k, Vec<T> dw) { store(grad_scores_ + r * stride + k, dw); };
      product_rows(grads_, values_, stride, head_.head_dim(), begin, end, zero, keep);
      for (int r = 0; r < kRows; ++r) {
        T* row = grad_scores_ + r * stride;
        if (r < count) head_.drop(queries[r], begin, end, row, row);
        for (int64_t k = begin; k < end; k += kLanes<T>)
          store(row + k, load(weights_ + r * stride + k) * (load(row + k) - broadcast(delta[r])));
      }
    } else {
      const auto keep = [&](int r, int64_t k, Vec<T> dw) {
        store(grad_scores_ + r * stride + k, load(weights_ + r * stride + k) * (dw - broadcast(delta[r])));
      };
      product_rows(grads_, values_, stride, head_.head_dim(), begin, end, zero, keep);
    }
    for (int r = 0; r < count; ++r) {
      T* sum = grad_bias_ + queries[r] * stride;
      const T* row = grad_scores_ + r * stride;
      for (int64_t k = begin; k < end; k += kLanes<T>) store(sum + k, load(sum + k) + load(row + k));
    }
  }

  void store_key_value_gradients(int64_t head, T* pad_partial) const {
    const int64_t width = head_.width(), head_dim = head_.head_dim(), channels = head_.channels();
    const T key_factor = static_cast<T>(kLn2);  // queries carry scale · log2 e
    for (int64_t i = 0; i < head_.tokens(); ++i) {
      const T *grad_key = grad_keys_ + i * width, *grad_value = grad_values_ + i * width;
      const int64_t token = head_.token(i);
      if (token >= 0) {
        const int64_t channel = token * 3 * channels + head * head_dim;
        store_row(grad_key, key_factor, call_.type, head_dim, at(call_.grad_qkv, call_.type, channel + channels));
        store_row(grad_value, T(1), call_.type, head_dim, at(call_.grad_qkv, call_.type, channel + 2 * channels));
      } else {
        for (int64_t d = 0; d < head_dim; ++d) {
          pad_partial[d] += grad_key[d] * key_factor;
          pad_partial[head_dim + d] += grad_value[d];
        }
      }
    }
  }

  // Sum of the dense bias gradient onto the entries of the table.
  void gather_bias_gradient(const WindowPattern& pattern, int64_t chunk) const {
    const int64_t length = bias_table_length(call_.plan->grid), origin = bias_origin(call_.plan->grid);
    T* partial = static_cast<T*>(call_.bias_partials) + chunk * length;
    for (int64_t i = 0; i < length; ++i) partial[i] = 0;
    for (int64_t q = 0; q < head_.tokens(); ++q) {
      T* entry = partial + pattern.bias_raster[q] + origin;
      const T* row = grad_bias_ + q * head_.padded_tokens();
      for (int64_t k = 0; k < head_.tokens(); ++k) entry[-pattern.bias_raster[k]] += row[k];
    }
  }

  const BackwardCall& call_;
  WindowHead<T, kHeadDim> head_;
  T *keys_, *values_;                          // (head_dim, padded n)
  T *key_rows_, *grad_keys_, *grad_values_;    // (padded n, width)
  T *query_rows_, *grad_rows_, *out_row_;      // (kRows, width), the last one row
  T *queries_, *grads_;                        // (head_dim, kRows)
  T *weights_, *dropped_, *grad_scores_, *bias_;  // (kRows, padded n)
  T* sums_;                                    // (kRows, width)
  T* grad_bias_;                               // (n, padded n)
};

}  // namespace SWIN_ISA
}  // namespace swin
