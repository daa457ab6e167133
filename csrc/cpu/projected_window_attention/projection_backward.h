// Gradients of qkv = layer_norm(x) · weightᵀ + bias on vectors, from those of qkv of one window at a time.
//
// With n = layer_norm(x) = x̂ ∘ γ + β and g the gradient of qkv:
//   dweight = gᵀ n;  dbias = Σ g;  dn = g weight;  dγ = Σ dn ∘ x̂;  dβ = Σ dn;
//   dx = (h - mean(h) - x̂ mean(h ∘ x̂)) / σ with h = dn ∘ γ.
#pragma once

#include "cpu/projected_window_attention/projection.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

class ProjectionBackward {
 public:
  ProjectionBackward(const ProjectedBackwardCall& call, Arena& arena)
      : call_(call),
        channels_(call.heads * call.head_dim),
        weights_(arena.take<float>(3 * channels_ * channels_)),
        norm_weight_(arena.take<float>(channels_)),
        grad_rows_(arena.take<float>(kRows * channels_)) {}

  void prepare() {
    for (int64_t c = 0; c < channels_; ++c) norm_weight_[c] = call_.norm_weight ? call_.norm_weight[c] : 1;
    float* panel = weights_;
    for (int64_t c = 0; c < channels_; c += kPanel)
      for (int64_t out = 0; out < 3 * channels_; ++out, panel += kPanel)
        for (int64_t i = 0; i < kPanel; ++i) panel[i] = call_.weight[out * channels_ + c + i];
  }

  // A window of `count` tokens: grad_qkv (padded_rows, 3C), zero beyond them, and rows (padded_rows, C) as
  // Projection::normalize writes them. Writes the tokens' grad_x; adds to `partial` (projection_parameters).
  void differentiate(const int64_t* tokens, int64_t count, const float* grad_qkv, const float* rows, float* partial) {
    const int64_t parts = 3 * channels_;
    with_width(channels_, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      static_assert(3 * kPanel % kRows == 0);
      for (int64_t out = 0; out < parts; out += kRows)
        for (int64_t c = 0; c < channels_; c += kWidth * kLanes<float>)
          outer_sum_block<float, kRows, kWidth>(grad_qkv + out, parts, rows + c, channels_, count,
                                                partial + out * channels_ + c, channels_);
    });
    float* grad_bias = partial + parts * channels_;
    for (int64_t c = 0; c < parts; c += kLanes<float>) {
      Vec<float> sum = {};
      for (int64_t i = 0; i < count; ++i) sum += load(grad_qkv + i * parts + c);
      store(grad_bias + c, load(grad_bias + c) + sum);
    }
    const auto zero = [](int, int64_t) { return Vec<float>{}; };
    const auto keep = [&](int r, int64_t column, auto& sums) {
      for (int c = 0; c < count_of(sums); ++c) store(grad_rows_ + r * channels_ + column + c * kLanes<float>, sums[c]);
    };
    for (int64_t first = 0; first < count; first += kRows) {
      product_rows<0>(grad_qkv + first * parts, parts, weights_, parts, 0, channels_, zero, keep);
      for (int64_t i = first; i < first + kRows && i < count; ++i)
        if (tokens[i] >= 0) differentiate_norm(tokens[i], grad_rows_ + (i - first) * channels_, grad_bias + parts);
    }
  }

 private:
  // From grad (C,) of a token's normalised row to its grad_x; grad_norm: of the norm's weight and bias (2, C).
  void differentiate_norm(int64_t token, const float* grad, float* grad_norm) const {
    float* grad_x = call_.grad_x + token * channels_;
    if (!call_.normalize) {
      for (int64_t c = 0; c < channels_; c += kLanes<float>) store(grad_x + c, load(grad + c));
      return;
    }
    const float* x = call_.x + token * channels_;
    const RowStatistics s = row_statistics(x, channels_, call_.norm_eps);
    const Vec<float> mean = broadcast(s.mean), scale = broadcast(s.scale);
    Vec<float> sum = {}, along = {};
    for (int64_t c = 0; c < channels_; c += kLanes<float>) {
      const Vec<float> normal = (load(x + c) - mean) * scale, dn = load(grad + c), h = dn * load(norm_weight_ + c);
      sum += h;
      along += h * normal;
      store(grad_norm + c, load(grad_norm + c) + dn * normal);
      store(grad_norm + channels_ + c, load(grad_norm + channels_ + c) + dn);
    }
    const Vec<float> mean_h = broadcast(sum_lanes<float>(sum) / static_cast<float>(channels_));
    const Vec<float> mean_along = broadcast(sum_lanes<float>(along) / static_cast<float>(channels_));
    for (int64_t c = 0; c < channels_; c += kLanes<float>) {
      const Vec<float> normal = (load(x + c) - mean) * scale, h = load(grad + c) * load(norm_weight_ + c);
      store(grad_x + c, (h - mean_h - normal * mean_along) * scale);
    }
  }

  const ProjectedBackwardCall& call_;
  const int64_t channels_;
  float* weights_;      // panels of C columns, 3C deep
  float* norm_weight_;  // (C,)
  float* grad_rows_;    // (kRows, C)
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
