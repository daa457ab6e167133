// The linear layer after the attention on vectors, for the tokens of one window at a time while they lie in cache:
// y = attended · out_weightᵀ + out_bias; and its gradients.
#pragma once

#include "cpu/projected_window_attention/projection.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

SWIN_ALWAYS_INLINE void copy_channels(const float* from, int64_t channels, float* to) {
  for (int64_t c = 0; c < channels; c += kLanes<float>) store(to + c, load(from + c));
}

class OutputProjection {
 public:
  OutputProjection(const ProjectedForwardCall& call, Arena& arena)
      : call_(call),
        channels_(call.heads * call.head_dim),
        weights_(arena.take<float>(channels_ * channels_)),
        bias_(arena.take<float>(channels_)),
        rows_(arena.take<float>(kRows * channels_)) {}

  void prepare() {
    if (!call_.out_weight) return;
    for (int64_t out = 0; out < channels_; out += kPanel) {
      const float* columns[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) columns[i] = call_.out_weight + (out + i) * channels_;
      transpose_to_panel(columns, channels_, weights_ + out * channels_);
    }
    for (int64_t c = 0; c < channels_; ++c) bias_[c] = call_.out_bias ? call_.out_bias[c] : 0;
  }

  // The tokens of a window, without padding (-1). Every token is in one window only, so its row may be overwritten.
  void project(const int64_t* tokens, int64_t count) const {
    if (!call_.out_weight) return;
    int64_t tile[kRows];
    int rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (tokens[i] >= 0) {
        copy_channels(static_cast<const float*>(call_.out) + tokens[i] * channels_, channels_,
                      rows_ + rows * channels_);
        tile[rows++] = tokens[i];
      }
      if (rows == 0 || (rows < kRows && i + 1 < count)) continue;
      for (int r = rows; r < kRows; ++r) copy_channels(rows_, channels_, rows_ + r * channels_);
      project_tile(tile, rows);
      rows = 0;
    }
  }

 private:
  void project_tile(const int64_t* tokens, int rows) const {
    with_width(channels_, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const auto init = [&](int, int64_t column) { return load(bias_ + column); };
      const auto finish = [&](int r, int64_t column, auto& sums) {
        if (r >= rows) return;
        float* row = call_.projected_out + tokens[r] * channels_ + column;
        for (int c = 0; c < kWidth; ++c) store(row + c * kLanes<float>, sums[c]);
      };
      for (int64_t c = 0; c < channels_; c += kWidth * kLanes<float>)
        product_block<0, kWidth>(rows_, channels_, weights_, channels_, c, init, finish);
    });
  }

  const ProjectedForwardCall& call_;
  const int64_t channels_;
  float *weights_, *bias_;  // panels of C columns; (C,)
  float* rows_;             // (kRows, C)
};

// With g the gradient of y: d attended = g out_weight;  dout_weight = gᵀ attended;  dout_bias = Σ g.
class OutputProjectionBackward {
 public:
  OutputProjectionBackward(const ProjectedBackwardCall& call, Arena& arena)
      : call_(call),
        channels_(call.heads * call.head_dim),
        row_stride_(round_up(channels_, kRows)),
        padded_rows_(Projection::padded_rows(call.plan->padded_tokens)),
        weights_(arena.take<float>(channels_ * channels_)),
        grads_(arena.take<float>(padded_rows_ * row_stride_)),
        attended_(arena.take<float>(padded_rows_ * channels_)),
        grad_weight_(arena.take<float>(row_stride_ * channels_)) {}

  void prepare() {
    if (!call_.out_weight) return;
    float* panel = weights_;
    for (int64_t c = 0; c < channels_; c += kPanel)
      for (int64_t out = 0; out < channels_; ++out, panel += kPanel)
        for (int64_t i = 0; i < kPanel; ++i) panel[i] = call_.out_weight[out * channels_ + c + i];
    for (int64_t i = 0; i < padded_rows_ * row_stride_; ++i) grads_[i] = 0;
  }

  // A window of `count` tokens: writes grad_attended (padded_rows, C), adds to `partial`: weight (C, C), bias (C,).
  void differentiate(const int64_t* tokens, int64_t count, float* grad_attended, float* partial) const {
    gather(tokens, count);
    const auto zero = [](int, int64_t) { return Vec<float>{}; };
    with_width(channels_, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t c = 0; c < channels_; c += kWidth * kLanes<float>) {
        for (int64_t first = 0; first < count; first += kRows) {
          const auto keep = [&](int r, int64_t column, auto& sums) {
            float* row = grad_attended + (first + r) * channels_ + column;
            for (int i = 0; i < kWidth; ++i) store(row + i * kLanes<float>, sums[i]);
          };
          product_block<0, kWidth>(grads_ + first * row_stride_, row_stride_, weights_, channels_, c, zero, keep);
        }
        for (int64_t i = 0; i < row_stride_; ++i)
          for (int64_t k = 0; k < kWidth * kLanes<float>; ++k) grad_weight_[i * channels_ + c + k] = 0;
        for (int64_t out = 0; out < channels_; out += kRows)
          outer_sum_block<float, kRows, kWidth>(grads_ + out, row_stride_, attended_ + c, channels_, count,
                                                grad_weight_ + out * channels_ + c, channels_);
      }
    });
    for (int64_t i = 0; i < channels_ * channels_; ++i) partial[i] += grad_weight_[i];
    float* grad_bias = partial + channels_ * channels_;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < channels_; c += kLanes<float>)
        store(grad_bias + c, load(grad_bias + c) + load(grads_ + i * row_stride_ + c));
  }

 private:
  void gather(const int64_t* tokens, int64_t count) const {
    const float *grad_out = static_cast<const float*>(call_.grad_out), *attended = call_.attended;
    for (int64_t i = 0; i < count; ++i) {
      prefetch_ahead(grad_out, tokens, i, count, channels_);
      prefetch_ahead(attended, tokens, i, count, channels_);
      float *grad = grads_ + i * row_stride_, *row = attended_ + i * channels_;
      if (tokens[i] >= 0) {
        copy_channels(grad_out + tokens[i] * channels_, channels_, grad);
        copy_channels(attended + tokens[i] * channels_, channels_, row);
      } else {
        for (int64_t c = 0; c < channels_; ++c) grad[c] = row[c] = 0;
      }
    }
  }

  const ProjectedBackwardCall& call_;
  const int64_t channels_, row_stride_, padded_rows_;  // row_stride_: C in whole tiles of rows
  float* weights_;                                     // panels of C columns, C deep
  float *grads_, *attended_;                           // (padded_rows, row_stride), (padded_rows, C)
  float* grad_weight_;                                 // (row_stride, C), of one window
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
