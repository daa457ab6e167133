// Gradients of window attention with its projections inside, on vectors: qkv of a few windows, computed again, and its
// gradient stay in cache.
#pragma once

#include "cpu/projected_window_attention/output_projection.h"
#include "cpu/projected_window_attention/projection.h"
#include "cpu/projected_window_attention/projection_backward.h"
#include "cpu/window_attention/backward.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

using namespace window_attention;

template <int kHeadDim>
class ProjectedBackwardWorker : BackwardWorker<float, kHeadDim> {
  using Base = BackwardWorker<float, kHeadDim>;
  using Base::grad_bias_, Base::group_;

 public:
  ProjectedBackwardWorker(const ProjectedBackwardCall& call, Arena& arena)
      : Base(call, arena, call.heads),
        call_(call),
        projection_(call, call, arena),
        projection_backward_(call, arena),
        output_backward_(call, arena),
        padded_rows_(Projection::padded_rows(group_.padded_tokens())),
        first_grad_bias_(grad_bias_) {
    const int64_t part = padded_rows_ * group_.channels();
    for (Parts& parts : parts_)
      parts = {arena.take<float>(part), arena.take<float>(part),     arena.take<float>(part),
               arena.take<float>(part), arena.take<float>(3 * part), arena.take<float>(call.out_weight ? part : 0)};
  }

  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    projection_.prepare();
    projection_backward_.prepare();
    output_backward_.prepare();
    for (int64_t i; (i = next.fetch_add(call_.heads)) < count;) run_item(chunks[i], i);
  }

 private:
  struct Parts {
    float *rows, *queries, *keys, *values;  // normalised x, q (padded_rows, C); k, v by head
    float* grad_qkv;                        // (padded_rows, 3C)
    float* grad_attended;                   // (padded_rows, C), where there is a layer after the attention
  };

  void run_item(const WindowChunk& chunk, int64_t index) {
    const int64_t parameters = projection_parameters(group_.channels());
    float* partial = call_.projection_partials + index / call_.heads * parameters;
    for (int64_t i = 0; i < parameters; ++i) partial[i] = 0;
    for (int64_t i = 0; i < call_.heads * Base::grad_bias_size(); ++i) first_grad_bias_[i] = 0;
    for (int64_t begin = chunk.begin; begin < chunk.end; begin += kGroup) {
      const int windows = static_cast<int>(chunk.end - begin < kGroup ? chunk.end - begin : kGroup);
      group_.enter(chunk.pattern, 0);
      for (int g = 0; g < windows; ++g) {
        place(g, begin + g);
        if (call_.out_weight)
          output_backward_.differentiate(group_.window(g).token, group_.tokens(), parts_[g].grad_attended,
                                         partial + output_parameters_begin(group_.channels()));
      }
      for (int64_t head = 0; head < call_.heads; ++head) {
        enter(chunk.pattern, head);
        for (int g = 0; g < windows; ++g) take(g, head);
        Base::differentiate_placed(windows);
        for (int g = 0; g < windows; ++g) keep_key_value_gradients(g, head);
      }
      for (int g = 0; g < windows; ++g)
        projection_backward_.differentiate(group_.window(g).token, group_.tokens(), parts_[g].grad_qkv, parts_[g].rows,
                                           partial);
    }
    for (int64_t head = 0; head < call_.heads; ++head) {
      enter(chunk.pattern, head);
      Base::gather_bias_gradient(index + head);
    }
  }

  void enter(int64_t pattern, int64_t head) {
    group_.enter(pattern, head);
    grad_bias_ = first_grad_bias_ + head * Base::grad_bias_size();
  }

  // Window g of the group becomes number i of the pattern, and is projected.
  void place(int g, int64_t i) {
    const Parts& parts = parts_[g];
    group_.place(g, i);
    projection_.normalize(group_.window(g).token, group_.tokens(), parts.rows);
    projection_.project(0, parts.rows, parts.queries);
    projection_.project_by_head(1, parts.rows, parts.keys);
    projection_.project_by_head(2, parts.rows, parts.values);
    const int64_t channels = group_.channels();
    for (int64_t t = 0; t < padded_rows_; ++t)  // rows that no gradient is written to: queries of padding, the last
      if (t >= group_.tokens() || group_.window(g).token[t] < 0)
        for (int64_t c = 0; c < 3 * channels; ++c) parts.grad_qkv[t * 3 * channels + c] = 0;
  }

  void take(int g, int64_t head) {
    GroupWindow<float>& window = group_.window(g);
    const Parts& parts = parts_[g];
    const int64_t part = head * group_.padded_tokens() * kHeadDim;
    window.queries = parts.queries + head * kHeadDim;
    window.query_stride = group_.channels();
    Base::rows_[g].keys = parts.keys + part;
    Base::rows_[g].grad_queries = parts.grad_qkv;
    Base::rows_[g].grad_out = call_.out_weight ? parts.grad_attended : nullptr;
    for (int64_t first = 0; first < group_.padded_tokens(); first += kPanel) {
      const float *keys[kPanel], *values[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) {
        keys[i] = parts.keys + part + (first + i) * kHeadDim;
        values[i] = parts.values + part + (first + i) * kHeadDim;
      }
      transpose_to_panel(keys, kHeadDim, window.keys + first * kHeadDim);
      transpose_to_panel(values, kHeadDim, window.values + first * kHeadDim);
    }
  }

  void keep_key_value_gradients(int g, int64_t head) {
    const int64_t channels = group_.channels();
    for (int64_t i = 0; i < group_.tokens(); ++i) {
      float* row = parts_[g].grad_qkv + i * 3 * channels + head * kHeadDim;
      for (int64_t d = 0; d < kHeadDim; d += kLanes<float>) {
        store(row + channels + d, load(Base::rows_[g].grad_keys + i * kHeadDim + d) * broadcast(Base::kKeyFactor));
        store(row + 2 * channels + d, load(Base::rows_[g].grad_values + i * kHeadDim + d));
      }
    }
  }

  const ProjectedBackwardCall& call_;
  Projection projection_;
  ProjectionBackward projection_backward_;
  OutputProjectionBackward output_backward_;
  const int64_t padded_rows_;
  float* first_grad_bias_;  // (heads, n, padded n)
  Parts parts_[kGroup];
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
