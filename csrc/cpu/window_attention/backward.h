// Gradients of window attention, scores computed again from the log-sum-exp of the forward.
//
// With p = softmax(scores), w = dropout(p), dw = dropout'(grad_out vᵀ), and δ = Σ p ∘ dw / Σ p per query:
//   dv = wᵀ grad_out;  ds = p ∘ (dw - δ);  dq = scale · ds k;  dk = scale · dsᵀ q;  dbias = ds.
// δ is also Σ grad_out · out, but with an output that was stored in 16 bits too little is left of dw - δ where one key
// has nearly all the weight. Dividing by Σ p removes what rounding a large log-sum-exp does to p.
#pragma once

#include "cpu/window_attention/window_group.h"

namespace swin {
namespace SWIN_ISA {
namespace window_attention {

template <class T, int kHeadDim>
class BackwardWorker {
 public:
  // Holds the dense bias gradient of `heads` heads; that of the first is current.
  BackwardWorker(const BackwardCall& call, Arena& arena, int64_t heads = 1)
      : call_(call),
        group_(call, arena),
        query_rows_(arena.take<T>(kRows * group_.width())),
        grad_rows_(arena.take<T>(kRows * group_.width())),
        weights_(arena.take<T>(kRows * group_.padded_tokens())),
        dropped_(arena.take<T>(kRows * group_.padded_tokens())),
        grad_scores_(arena.take<T>(kRows * group_.padded_tokens())),
        sums_(arena.take<T>(kRows * group_.width())),
        grad_bias_(arena.take<T>(heads * grad_bias_size())) {
    for (WindowRows& rows : rows_) {
      rows.keys = arena.take<T>(group_.padded_tokens() * group_.width());
      rows.grad_keys = arena.take<T>(group_.padded_tokens() * group_.width());
      rows.grad_values = arena.take<T>(group_.padded_tokens() * group_.width());
    }
  }

  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) run_chunk(chunks[i], i);
  }

 protected:
  struct WindowRows {
    T *keys, *grad_keys, *grad_values;  // (padded n, width)
    T* grad_queries = nullptr;          // (n, 3C), or null: they are written to the call's grad_qkv
    const T* grad_out = nullptr;        // (n, C), or null: it is read from the call's
  };

  static constexpr T kKeyFactor = static_cast<T>(kLn2);  // queries carry scale · log2 e

  int64_t grad_bias_size() const { return group_.tokens() * group_.padded_tokens(); }

  void run_chunk(const WindowChunk& chunk, int64_t index) {
    group_.enter(chunk.pattern, chunk.head);
    T* pad_partial = static_cast<T*>(call_.pad_partials) + index * 2 * group_.head_dim();
    for (int64_t d = 0; d < 2 * group_.head_dim(); ++d) pad_partial[d] = 0;
    for (int64_t i = 0; i < grad_bias_size(); ++i) grad_bias_[i] = 0;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kGroup) {
      const int count = static_cast<int>(chunk.end - begin < kGroup ? chunk.end - begin : kGroup);
      differentiate(begin, count);
      for (int g = 0; g < count; ++g) store_key_value_gradients(g, pad_partial);
    }
    gather_bias_gradient(index);
  }

  void differentiate(int64_t begin, int count) {
    for (int g = 0; g < count; ++g) {
      GroupWindow<T>& window = group_.window(g);
      group_.place(g, begin + g);
      group_.pack(window, 1, window.keys, rows_[g].keys);
      group_.pack(window, 2, window.values, nullptr);
    }
    differentiate_placed(count);
  }

  // Windows [0, count) of the group, whose tokens, keys (as panels and as rows) and values (as panels) are ready.
  void differentiate_placed(int count) {
    for (int g = 0; g < count; ++g) {
      const WindowRows& rows = rows_[g];
      for (int64_t i = 0; i < group_.padded_tokens() * group_.width(); ++i) rows.grad_keys[i] = rows.grad_values[i] = 0;
      if (group_.pattern().region_count > 1) group_.bound(group_.window(g), group_.padded_tokens() * group_.head_dim());
    }
    const auto prefetch = [&](int64_t token) {
      if (call_.qkv) {
        group_.prefetch_part(token, 0);
        group_.prefetch_row(call_.grad_qkv, token * 3 * group_.channels());
      }
      if (!rows_[0].grad_out) group_.prefetch_row(call_.grad_out, token * group_.channels());
      __builtin_prefetch(static_cast<const T*>(call_.lse) + token * call_.heads);
    };
    group_.for_each_block(count, prefetch,
                          [&](const GroupWindow<T>& window, const Region& region, int64_t first, int64_t last) {
                            group_.for_each_tile(window, first, last, [&](const int64_t* queries, int rows) {
                              differentiate_tile(window, region, queries, rows);
                            });
                          });
  }

  void differentiate_tile(const GroupWindow<T>& window, const Region& region, const int64_t* queries, int rows) {
    const int64_t stride = group_.padded_tokens(), width = group_.width(), head_dim = group_.head_dim();
    const WindowRows& window_rows = rows_[&window - &group_.window(0)];
    T offset[kRows];
    load_queries(window, queries, rows, offset);
    bool others = false;
    if (group_.pattern().region_count > 1) {
      T norm[kRows];
      group_.norms(query_rows_, norm);
      others = group_.others_matter(window, norm, rows, offset);
    }
    const int64_t begin = others ? 0 : region.begin, end = others ? stride : region.end;
    T* weights = weights_;
    const auto weigh = [&, stride, weights](int r, int64_t column, auto& x) __attribute__((always_inline)) {
      for (int c = 0; c < count_of(x); ++c) x[c] -= broadcast(offset[r]);
      powers_of_two<T>(x);
      for (int c = 0; c < count_of(x); ++c) store(weights + r * stride + column + c * kLanes<T>, x[c]);
    };
    if (others)
      group_.score_all(query_rows_, queries, region, window.keys, weigh);
    else
      group_.score(query_rows_, queries, region, window.keys, weigh);
    for (int r = rows; r < kRows; ++r)  // rows beyond the tile's queries must not reach any sum
      for (int64_t k = begin; k < end; ++k) weights_[r * stride + k] = 0;

    const T* used_weights = weights_;
    if (call_.dropout_p > 0) {
      for (int64_t i = rows * stride; i < kRows * stride; ++i) dropped_[i] = 0;
      for (int r = 0; r < rows; ++r)
        group_.drop(window, queries[r], begin, end, weights_ + r * stride, dropped_ + r * stride);
      used_weights = dropped_;
    }
    scatter_rows(used_weights, stride, grad_rows_, width, begin, end, window_rows.grad_values);

    score_gradients(window, queries, rows, begin, end);
    scatter_rows(grad_scores_, stride, query_rows_, width, begin, end, window_rows.grad_keys);
    weighted_sum(grad_scores_, stride, window_rows.keys, width, begin, end, sums_);
    for (int r = 0; r < rows; ++r) {
      const int64_t row = window_rows.grad_queries ? queries[r] : window.token[queries[r]];
      const int64_t channel = row * 3 * group_.channels() + group_.head() * head_dim;
      store_row(
          sums_ + r * width, static_cast<T>(call_.scale), call_.type, head_dim,
          window_rows.grad_queries ? window_rows.grad_queries + channel : at(call_.grad_qkv, call_.type, channel));
    }
  }

  // Queries (times scale · log2 e) and output gradients of a tile, and the log-sum-exp of each in base 2.
  void load_queries(const GroupWindow<T>& window, const int64_t* queries, int rows, T* offset) {
    const int64_t width = group_.width(), head_dim = group_.head_dim();
    const T* window_grad_out = rows_[&window - &group_.window(0)].grad_out;
    for (int r = 0; r < kRows; ++r) {
      T *query = query_rows_ + r * width, *grad = grad_rows_ + r * width;
      if (r >= rows) {
        for (int64_t d = 0; d < width; ++d) query[d] = grad[d] = 0;
        offset[r] = 0;
        continue;
      }
      const int64_t token = window.token[queries[r]];
      const int64_t head_channel = group_.head() * head_dim, out_channel = token * group_.channels() + head_channel;
      group_.load_query(window, queries[r], query);
      group_.copy_padded(window_grad_out ? window_grad_out + queries[r] * group_.channels() + head_channel
                                         : group_.row_of(call_.grad_out, out_channel, grad),
                         grad);
      offset[r] = static_cast<const T*>(call_.lse)[token * call_.heads + group_.head()] * static_cast<T>(kLog2E);
    }
  }

  // ds of a tile into grad_scores_, added to the bias gradient of its queries.
  void score_gradients(const GroupWindow<T>& window, const int64_t* queries, int rows, int64_t begin, int64_t end) {
    const int64_t stride = group_.padded_tokens();
    Vec<T> dot[kRows] = {}, total[kRows] = {};  // Σ p ∘ dw and Σ p
    const auto zero = [](int, int64_t) { return Vec<T>{}; };
    const auto product = [&](const auto& keep) {
      product_rows<kHeadDim>(grad_rows_, group_.width(), window.values, group_.head_dim(), begin, end, zero, keep);
    };
    const T* weights = weights_;
    T* grad_scores = grad_scores_;
    if (call_.dropout_p > 0) {
      product([=](int r, int64_t k, auto& dw) {
        for (int c = 0; c < count_of(dw); ++c) store(grad_scores + r * stride + k + c * kLanes<T>, dw[c]);
      });
      for (int r = 0; r < rows; ++r) {
        T* row = grad_scores + r * stride;
        group_.drop(window, queries[r], begin, end, row, row);
        for (int64_t k = begin; k < end; k += kLanes<T>) {
          const Vec<T> p = load(weights + r * stride + k);
          dot[r] += p * load(row + k);
          total[r] += p;
        }
      }
    } else {
      product([&, stride, weights, grad_scores](int r, int64_t k, auto& dw) __attribute__((always_inline)) {
        Vec<T> part = {}, part_total = {};
        for (int c = 0; c < count_of(dw); ++c, k += kLanes<T>) {
          const Vec<T> p = load(weights + r * stride + k);
          part += p * dw[c];
          part_total += p;
          store(grad_scores + r * stride + k, dw[c]);
        }
        dot[r] += part;
        total[r] += part_total;
      });
    }
    for (int r = 0; r < rows; ++r) {
      const Vec<T> delta = broadcast(sum_lanes<T>(dot[r]) / sum_lanes<T>(total[r]));
      const T* row_weights = weights + r * stride;
      T *row = grad_scores + r * stride, *sum = grad_bias_ + queries[r] * stride;
      for (int64_t k = begin; k < end; k += kLanes<T>) {
        const Vec<T> ds = load(row_weights + k) * (load(row + k) - delta);
        store(row + k, ds);
        store(sum + k, load(sum + k) + ds);
      }
    }
    for (int64_t i = rows * stride; i < kRows * stride; ++i) grad_scores[i] = 0;  // as the weights of these rows
  }

  void store_key_value_gradients(int g, T* pad_partial) {
    const int64_t width = group_.width(), head_dim = group_.head_dim(), channels = group_.channels();
    for (int64_t i = 0; i < group_.tokens(); ++i) {
      const T *grad_key = rows_[g].grad_keys + i * width, *grad_value = rows_[g].grad_values + i * width;
      const int64_t token = group_.window(g).token[i];
      if (token >= 0) {
        const int64_t channel = token * 3 * channels + group_.head() * head_dim;
        store_row(grad_key, kKeyFactor, call_.type, head_dim, at(call_.grad_qkv, call_.type, channel + channels));
        store_row(grad_value, T(1), call_.type, head_dim, at(call_.grad_qkv, call_.type, channel + 2 * channels));
      } else {
        for (int64_t d = 0; d < head_dim; ++d) {
          pad_partial[d] += grad_key[d] * kKeyFactor;
          pad_partial[head_dim + d] += grad_value[d];
        }
      }
    }
  }

  // Sum of the dense bias gradient onto the entries of the table.
  void gather_bias_gradient(int64_t chunk) const {
    const int64_t length = bias_table_length(call_.plan->grid), origin = bias_origin(call_.plan->grid);
    const int32_t* raster = group_.pattern().bias_raster;
    T* partial = static_cast<T*>(call_.bias_partials) + chunk * length;
    for (int64_t i = 0; i < length; ++i) partial[i] = 0;
    for (int64_t q = 0; q < group_.tokens(); ++q) {
      T* entry = partial + raster[q] + origin;
      const T* row = grad_bias_ + q * group_.padded_tokens();
      for (int64_t k = 0; k < group_.tokens(); ++k) entry[-raster[k]] += row[k];
    }
  }

  const BackwardCall& call_;
  WindowGroup<T, kHeadDim> group_;
  WindowRows rows_[kGroup];
  T *query_rows_, *grad_rows_;            // (kRows, width)
  T *weights_, *dropped_, *grad_scores_;  // (kRows, padded n)
  T* sums_;                               // (kRows, width)
  T* grad_bias_;                          // (n, padded n)
};

}  // namespace window_attention
}  // namespace SWIN_ISA
}  // namespace swin
