// qkv = layer_norm(x) · weightᵀ + bias on vectors, for the tokens of one window at a time, in the layouts that
// attention reads.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/arena.h"
#include "cpu/projected_window_attention/kernels.h"
#include "cpu/tiles.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

// Up to here qkv of a group of windows stays in the second-level cache.
constexpr int64_t kMostProjectedChannels = 64;

// f(width), a constant that divides the vectors of `channels`, which are a multiple of kPanel.
template <class F>
SWIN_ALWAYS_INLINE void with_width(int64_t channels, const F& f) {
  if constexpr (SWIN_VECTOR_BYTES == 64) {
    static_assert(kMostProjectedChannels <= 4 * kLanes<float>);
    switch (channels / kLanes<float>) {
      case 1: return f(std::integral_constant<int, 1>());
      case 2: return f(std::integral_constant<int, 2>());
      case 3: return f(std::integral_constant<int, 3>());
      default: return f(std::integral_constant<int, 4>());
    }
  } else {
    f(std::integral_constant<int, 2>());
  }
}

// Rows of a volume (…, C) lie far apart in memory: prefetches that of a token soon to come.
SWIN_ALWAYS_INLINE void prefetch_ahead(const float* volume, const int64_t* tokens, int64_t i, int64_t count,
                                       int64_t channels) {
  constexpr int64_t kAhead = 12;
  if (i + kAhead < count && tokens[i + kAhead] >= 0)
    for (int64_t c = 0; c < channels; c += 16) __builtin_prefetch(volume + tokens[i + kAhead] * channels + c);
}

struct RowStatistics {
  float mean, scale;  // scale: 1 / sqrt(variance + eps)
};

// Of a row of x, as in Ba et al., https://arxiv.org/abs/1607.06450; the variance in a second pass.
SWIN_ALWAYS_INLINE RowStatistics row_statistics(const float* x, int64_t channels, float eps) {
  Vec<float> sum = {}, squares = {};
  for (int64_t c = 0; c < channels; c += kLanes<float>) sum += load(x + c);
  const float mean = sum_lanes<float>(sum) / static_cast<float>(channels);
  for (int64_t c = 0; c < channels; c += kLanes<float>) {
    const Vec<float> centred = load(x + c) - broadcast(mean);
    squares += centred * centred;
  }
  return {mean, 1 / std::sqrt(sum_lanes<float>(squares) / static_cast<float>(channels) + eps)};
}

class Projection {
 public:
  Projection(const ProjectionInputs& inputs, const AttentionCall& call, Arena& arena)
      : inputs_(inputs),
        head_dim_(call.head_dim),
        channels_(call.heads * call.head_dim),
        padded_tokens_(call.plan->padded_tokens),
        key_rows_(round_up(channels_, kRows)),
        key_weights_(arena.take<float>(key_rows_ * channels_)),
        weights_(arena.take<float>(3 * channels_ * channels_)),
        bias_(arena.take<float>(3 * channels_ + kRows)),
        norm_(arena.take<float>(2 * channels_)),
        panels_(arena.take<float>(kColumns * channels_)) {}

  // Rows of x of a window, with room for a last tile: what normalize() writes.
  static int64_t padded_rows(int64_t padded_tokens) { return round_up(padded_tokens, kRows); }

  void prepare() {
    for (int64_t i = 0; i < 3 * channels_ + kRows; ++i)
      bias_[i] = inputs_.bias && i < 3 * channels_ ? inputs_.bias[i] : 0;
    for (int64_t c = 0; c < channels_; ++c) {
      norm_[c] = inputs_.norm_weight ? inputs_.norm_weight[c] : 1;
      norm_[channels_ + c] = inputs_.norm_bias ? inputs_.norm_bias[c] : 0;
    }
    for (int64_t i = 0; i < key_rows_ * channels_; ++i)
      key_weights_[i] = i < channels_ * channels_ ? inputs_.weight[channels_ * channels_ + i] : 0;
    for (int64_t out = 0; out < 3 * channels_; out += kPanel) {
      const float* columns[kPanel];
      for (int64_t i = 0; i < kPanel; ++i) columns[i] = inputs_.weight + (out + i) * channels_;
      transpose_to_panel(columns, channels_, weights_ + out * channels_);
    }
  }

  // rows (padded_rows, C) of a window's tokens (n), normalised; zero for padding (-1) and beyond n.
  void normalize(const int64_t* tokens, int64_t count, float* rows) const {
    for (int64_t i = 0; i < count; ++i) {
      prefetch_ahead(inputs_.x, tokens, i, count, channels_);
      normalize_row(tokens[i], rows + i * channels_);
    }
    for (int64_t i = count * channels_; i < padded_rows(padded_tokens_) * channels_; ++i) rows[i] = 0;
  }

  // `part` (0 q, 1 k, 2 v) of these rows (padded n, C).
  void project(int part, const float* rows, float* to) const {
    project_part(part, rows, [&](int64_t token, int64_t channel) { return to + token * channels_ + channel; });
  }

  // The same with the rows of each head by themselves, (heads, padded n, head_dim).
  void project_by_head(int part, const float* rows, float* to) const {
    project_part(part, rows, [&](int64_t token, int64_t channel) {
      return to + (channel / head_dim_ * padded_tokens_ + token) * head_dim_ + channel % head_dim_;
    });
  }

  // Keys as panels, (heads, padded n / kPanel, head_dim, kPanel): channels in rows, tokens in columns.
  void project_keys(const float* rows, float* keys) const {
    for (int64_t first = 0; first < padded_tokens_; first += kColumns) {
      const int64_t columns = first + kColumns < padded_tokens_ ? kColumns : padded_tokens_ - first;
      for (int64_t t = 0; t < columns; t += kPanel) {
        const float* token_rows[kPanel];
        for (int64_t i = 0; i < kPanel; ++i) token_rows[i] = rows + (first + t + i) * channels_;
        transpose_to_panel(token_rows, channels_, panels_ + t * channels_);
      }
      for (int64_t channel = 0; channel < channels_; channel += kRows) {
        const auto init = [&](int r, int64_t) { return broadcast(bias_[channels_ + channel + r]); };
        const auto finish = [&](int r, int64_t column, auto& sums) {
          const int64_t out = channel + r;
          if (out >= channels_) return;
          float* row = keys + out / head_dim_ * padded_tokens_ * head_dim_ + out % head_dim_ * kPanel;
          for (int c = 0; c < count_of(sums); ++c) {
            const int64_t token = first + column + c * kLanes<float>;
            store(row + token / kPanel * kPanel * head_dim_ + token % kPanel, sums[c]);
          }
        };
        product_rows<0>(key_weights_ + channel * channels_, channels_, panels_, channels_, 0, columns, init, finish);
      }
    }
  }

 private:
  static constexpr int64_t kColumns = 4 * kPanel;  // tokens whose x, transposed, stays in the first-level cache

  void normalize_row(int64_t token, float* row) const {
    if (token < 0) {
      for (int64_t c = 0; c < channels_; ++c) row[c] = 0;
      return;
    }
    const float* x = inputs_.x + token * channels_;
    if (!inputs_.normalize) {
      for (int64_t c = 0; c < channels_; c += kLanes<float>) store(row + c, load(x + c));
      return;
    }
    const RowStatistics s = row_statistics(x, channels_, inputs_.norm_eps);
    const Vec<float> mean = broadcast(s.mean), scale = broadcast(s.scale);
    for (int64_t c = 0; c < channels_; c += kLanes<float>)
      store(row + c, (load(x + c) - mean) * scale * load(norm_ + c) + load(norm_ + channels_ + c));
  }

  // Tokens in rows, channels in columns; to(token, channel) is where the vectors from that channel on are stored.
  template <class To>
  void project_part(int part, const float* rows, const To& to) const {
    with_width(channels_, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      for (int64_t first = 0; first < padded_tokens_; first += kRows) {
        const auto init = [&](int, int64_t column) { return load(bias_ + column); };
        const auto finish = [&](int r, int64_t column, auto& sums) {
          if (first + r >= padded_tokens_) return;
          for (int c = 0; c < kWidth; ++c) store(to(first + r, column - part * channels_ + c * kLanes<float>), sums[c]);
        };
        for (int64_t c = 0; c < channels_; c += kWidth * kLanes<float>)
          product_block<0, kWidth>(rows + first * channels_, channels_, weights_, channels_, part * channels_ + c, init,
                                   finish);
      }
    });
  }

  const ProjectionInputs& inputs_;
  const int64_t head_dim_, channels_, padded_tokens_, key_rows_;
  float *key_weights_, *weights_;  // (C in whole tiles of rows, C); panels of 3C columns
  float *bias_, *norm_;            // (3C and a tile of zeros); weight and bias (2, C)
  float* panels_;                  // kColumns rows, transposed
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
