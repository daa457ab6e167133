// qkv = layer_norm(x) · weightᵀ + bias on vectors, for the tokens of one window at a time: keys as the panels and
// values as the rows that attention reads, queries as rows of all heads.
#pragma once

#include <cmath>

#include "kernels.h"
#include "tiles.h"
#include "window_attention.h"

namespace swin {
namespace SWIN_ISA {

class Projection {
 public:
  Projection(const ProjectedForwardCall& call, Arena& arena)
      : call_(call),
        head_dim_(call.head_dim),
        channels_(call.heads * call.head_dim),
        padded_tokens_(call.plan->padded_tokens),
        key_rows_(round_up(channels_, kRows)),
        key_weights_(arena.take<float>(key_rows_ * channels_)),
        weights_(arena.take<float>(2 * channels_ * channels_)),
        bias_(arena.take<float>(3 * channels_ + kRows)),
        norm_(arena.take<float>(2 * channels_)),
        rows_(arena.take<float>(round_up(padded_tokens_, kRows) * channels_)),
        panels_(arena.take<float>(kColumns * channels_)) {}

  void prepare() {
    for (int64_t i = 0; i < 3 * channels_ + kRows; ++i) bias_[i] = call_.bias && i < 3 * channels_ ? call_.bias[i] : 0;
    for (int64_t c = 0; c < channels_; ++c) {
      norm_[c] = call_.norm_weight ? call_.norm_weight[c] : 1;
      norm_[channels_ + c] = call_.norm_bias ? call_.norm_bias[c] : 0;
    }
    for (int64_t i = 0; i < key_rows_ * channels_; ++i)
      key_weights_[i] = i < channels_ * channels_ ? call_.weight[channels_ * channels_ + i] : 0;
    for (int64_t out = 0; out < 2 * channels_; out += kPanel) {
      const float* columns[kPanel];
      for (int64_t i = 0; i < kPanel; ++i)
        columns[i] = call_.weight + (out + i + (out < channels_ ? 0 : channels_)) * channels_;
      transpose_to_panel(columns, channels_, weights_ + out * channels_);
    }
  }

  // Of a window's tokens (n); padding (-1), whose x is 0, gets the bias, and so do the columns beyond n.
  // queries (padded n, C); keys, for each head (padded n / kPanel, head_dim, kPanel); values, for each (padded n,
  // head_dim).
  void project(const int64_t* tokens, int64_t count, float* queries, float* keys, float* values) {
    for (int64_t i = 0; i < count; ++i) {
      constexpr int64_t kAhead = 12;
      if (i + kAhead < count && tokens[i + kAhead] >= 0)
        for (int64_t c = 0; c < channels_; c += 16) __builtin_prefetch(call_.x + tokens[i + kAhead] * channels_ + c);
      place_row(tokens[i], rows_ + i * channels_);
    }
    for (int64_t i = count * channels_; i < round_up(padded_tokens_, kRows) * channels_; ++i) rows_[i] = 0;
    project_keys(keys);
    project_rows(queries, values);
  }

 private:
  static constexpr int64_t kColumns = 4 * kPanel;  // tokens whose x, transposed, stays in the first-level cache

  // Layer normalisation of one token, as in Ba et al., https://arxiv.org/abs/1607.06450; the variance in a second pass.
  void place_row(int64_t token, float* row) const {
    if (token < 0) {
      for (int64_t c = 0; c < channels_; ++c) row[c] = 0;
      return;
    }
    const float* x = call_.x + token * channels_;
    if (!call_.normalize) {
      for (int64_t c = 0; c < channels_; c += kLanes<float>) store(row + c, load(x + c));
      return;
    }
    Vec<float> sum = {}, squares = {};
    for (int64_t c = 0; c < channels_; c += kLanes<float>) sum += load(x + c);
    const Vec<float> mean = broadcast(sum_lanes<float>(sum) / static_cast<float>(channels_));
    for (int64_t c = 0; c < channels_; c += kLanes<float>) {
      const Vec<float> centred = load(x + c) - mean;
      squares += centred * centred;
    }
    const float variance = sum_lanes<float>(squares) / static_cast<float>(channels_);
    const Vec<float> scale = broadcast(1 / std::sqrt(variance + call_.norm_eps));
    for (int64_t c = 0; c < channels_; c += kLanes<float>)
      store(row + c, (load(x + c) - mean) * scale * load(norm_ + c) + load(norm_ + channels_ + c));
  }

  // Channels in rows, tokens in columns: what is stored is a panel of keys.
  void project_keys(float* keys) {
    for (int64_t first = 0; first < padded_tokens_; first += kColumns) {
      const int64_t columns = first + kColumns < padded_tokens_ ? kColumns : padded_tokens_ - first;
      for (int64_t t = 0; t < columns; t += kPanel) {
        const float* token_rows[kPanel];
        for (int64_t i = 0; i < kPanel; ++i) token_rows[i] = rows_ + (first + t + i) * channels_;
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

  // Tokens in rows, channels in columns.
  void project_rows(float* queries, float* values) {
    const int64_t vectors = 2 * channels_ / kLanes<float>;
    if (SWIN_VECTOR_BYTES == 64 && vectors % 4 == 0)
      return project_columns<SWIN_VECTOR_BYTES == 64 ? 4 : 1>(queries, values);
    if (SWIN_VECTOR_BYTES == 64 && vectors % 3 == 0)
      return project_columns<SWIN_VECTOR_BYTES == 64 ? 3 : 1>(queries, values);
    project_columns<2>(queries, values);
  }

  template <int kWidth>
  void project_columns(float* queries, float* values) {
    for (int64_t first = 0; first < padded_tokens_; first += kRows) {
      const auto init = [&](int, int64_t column) {
        return load(bias_ + column + (column < channels_ ? 0 : channels_));
      };
      const auto finish = [&](int r, int64_t column, auto& sums) {
        const int64_t token = first + r;
        if (token >= padded_tokens_) return;
        for (int c = 0; c < kWidth; ++c, column += kLanes<float>) {
          const int64_t out = column - channels_;
          if (out < 0)
            store(queries + token * channels_ + column, sums[c]);
          else
            store(values + (out / head_dim_ * padded_tokens_ + token) * head_dim_ + out % head_dim_, sums[c]);
        }
      };
      for (int64_t column = 0; column < 2 * channels_; column += kWidth * kLanes<float>)
        product_block<0, kWidth>(rows_ + first * channels_, channels_, weights_, channels_, column, init, finish);
    }
  }

  const ProjectedForwardCall& call_;
  const int64_t head_dim_, channels_, padded_tokens_, key_rows_;
  float *key_weights_, *weights_;  // (C in whole tiles of rows, C); panels of queries' and values'
  float *bias_, *norm_;            // (3C and a tile of zeros); weight and bias (2, C)
  float* rows_;                    // normalised x (padded n in whole tiles of rows, C)
  float* panels_;                  // kColumns of them, transposed
};

}  // namespace SWIN_ISA
}  // namespace swin
