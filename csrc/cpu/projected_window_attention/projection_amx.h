// qkv = layer_norm(x) · weightᵀ + bias on AMX, for the tokens of one window at a time.
#pragma once

#include "cpu/amx.h"
#include "cpu/arena.h"
#include "cpu/projected_window_attention/kernels.h"
#include "cpu/tiles.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

class AmxProjection {
 public:
  static constexpr int64_t kMostPieces = 4;  // of 16 channels

  AmxProjection(const ProjectedForwardCall& call, Arena& arena)
      : call_(call),
        channels_(call.heads * call.head_dim),
        pieces_(channels_ / kTileRows),
        weights_(arena.take<char>(3 * pieces_ * pieces_ * kRightBlockBytes)),
        rows_(arena.take<char>(4 * pieces_ * kLeftBytes)),
        bias_(arena.take<float>(3 * channels_)),
        norm_(arena.take<float>(2 * channels_)),
        panel_(arena.take<float>(kTileRows * kTileRows)) {}

  // Rows of a window's qkv, with room for the last 32.
  static int64_t padded_rows(int64_t tokens) { return round_up(tokens, 2 * kTileRows); }

  void prepare() {
    for (int64_t i = 0; i < 3 * channels_; ++i) bias_[i] = call_.bias ? call_.bias[i] : 0;
    for (int64_t c = 0; c < channels_; ++c) {
      norm_[c] = call_.norm_weight ? call_.norm_weight[c] : 1;
      norm_[channels_ + c] = call_.norm_bias ? call_.norm_bias[c] : 0;
    }
    char* block = weights_;
    for (int64_t out = 0; out < 3 * channels_; out += kTileRows)
      for (int64_t in = 0; in < channels_; in += kTileRows, block += kRightBlockBytes) {
        const float* columns[kTileRows];
        for (int i = 0; i < kTileRows; ++i) columns[i] = call_.weight + (out + i) * channels_ + in;
        transpose_to_panel(columns, kTileRows, panel_);
        split_right_block(panel_, block);
      }
  }

  // qkv (padded_rows, 3C) of `count` tokens; those of padding (-1), whose x is 0, get the bias.
  void project(const int64_t* tokens, int64_t count, float* qkv) {
    static_assert(kMostPieces == 4);
    switch (pieces_) {  // with a number that the compiler knows, a token stays in registers
      case 1: return project_pieces<1>(tokens, count, qkv);
      case 2: return project_pieces<2>(tokens, count, qkv);
      case 3: return project_pieces<3>(tokens, count, qkv);
      case 4: return project_pieces<4>(tokens, count, qkv);
    }
  }

 private:
  template <int kPieces>
  void project_pieces(const int64_t* tokens, int64_t count, float* qkv) {
    char *now = rows_, *next = rows_ + 2 * kPieces * kLeftBytes;
    for (int64_t i = 0; i < kRowsAtOnce; ++i) split_token<kPieces>(i < count ? tokens[i] : -1, i, now);
    for (int64_t first = 0; first < count; first += kRowsAtOnce) {
      // The vector units prepare the next rows while the tile unit multiplies these.
      const bool more = first + kRowsAtOnce < count;
      multiply<kPieces>(now, qkv + first * 3 * channels_, [&](int64_t i) __attribute__((always_inline)) {
        const int64_t t = first + kRowsAtOnce + i;
        if (more) split_token<kPieces>(t < count ? tokens[t] : -1, i, next);
      });
      char* done = now;
      now = next;
      next = done;
    }
  }

  static constexpr int64_t kLeftBytes = 3 * kTileBytes, kRowsAtOnce = 2 * kTileRows;

  // Layer normalisation of one token, as in Ba et al., https://arxiv.org/abs/1607.06450; the variance in a second pass.
  template <int kPieces>
  SWIN_ALWAYS_INLINE void normalize(__m512 (&x)[kPieces]) const {
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (int piece = 0; piece < kPieces; ++piece) sum += x[piece];
    const __m512 mean = _mm512_set1_ps(sum_lanes<float>(sum) / static_cast<float>(channels_));
    for (int piece = 0; piece < kPieces; ++piece) {
      x[piece] -= mean;
      squares += x[piece] * x[piece];
    }
    const float variance = sum_lanes<float>(squares) / static_cast<float>(channels_);
    const __m512 scale = _mm512_set1_ps(1 / std::sqrt(variance + call_.norm_eps));
    for (int piece = 0; piece < kPieces; ++piece)
      x[piece] = x[piece] * scale * load(norm_ + piece * kTileRows) + load(norm_ + channels_ + piece * kTileRows);
  }

  // A token as row `i` of 32, as tiles of the left side.
  template <int kPieces>
  SWIN_ALWAYS_INLINE void split_token(int64_t token, int64_t i, char* rows) const {
    __m512 x[kPieces];
    for (int piece = 0; piece < kPieces; ++piece)
      x[piece] = token < 0 ? _mm512_setzero_ps() : load(call_.x + token * channels_ + piece * kTileRows);
    if (call_.normalize && token >= 0) normalize(x);
    char* tiles = rows + i / kTileRows * kPieces * kLeftBytes;
    for (int piece = 0; piece < kPieces; ++piece) split_left_row(x[piece], i % kTileRows, tiles + piece * kLeftBytes);
  }

  // 32 rows: two tiles of sums share every tile of weights. Calls beside(i) for i from 0 to 31 along the way.
  template <int kPieces, class Beside>
  SWIN_ALWAYS_INLINE void multiply(const char* rows, float* qkv, const Beside& beside) const {
    enum Tile { kUpper, kLower, kUpper11, kUpper22, kLower11, kLower22, kPart12, kPart31 };
    const int64_t row_bytes = 3 * channels_ * static_cast<int64_t>(sizeof(float));
    const int64_t steps = 9 * kPieces * pieces_;
    const char* weights = weights_;
    int64_t step = 0, done = 0;
    for (int64_t out = 0; out < 3 * channels_; out += kTileRows) {
      tile_load<kUpper>(bias_ + out, 0);
      tile_load<kLower>(bias_ + out, 0);
      for (int64_t piece = 0; piece < kPieces; ++piece, weights += kRightBlockBytes) {
        const char *upper = rows + piece * kLeftBytes, *lower = rows + (kPieces + piece) * kLeftBytes;
        const auto keep_pace = [&]() __attribute__((always_inline)) {
          for (++step; done * steps < step * kRowsAtOnce; ++done) beside(done);
        };
        tile_load<kPart12>(weights + kTileBytes / 2, kTileRowBytes);
        tile_load<kUpper22>(upper + kTileBytes, kTileRowBytes);
        tile_multiply<kUpper, kUpper22, kPart12>();
        tile_load<kLower22>(lower + kTileBytes, kTileRowBytes);
        tile_multiply<kLower, kLower22, kPart12>();
        keep_pace();
        tile_load<kUpper11>(upper, kTileRowBytes);
        tile_multiply<kUpper, kUpper11, kPart12>();
        tile_load<kLower11>(lower, kTileRowBytes);
        tile_multiply<kLower, kLower11, kPart12>();
        keep_pace();
        tile_load<kPart31>(weights, kTileRowBytes);
        tile_load<kUpper22>(upper + 2 * kTileBytes, kTileRowBytes);
        tile_multiply<kUpper, kUpper22, kPart31>();
        tile_load<kLower22>(lower + 2 * kTileBytes, kTileRowBytes);
        tile_multiply<kLower, kLower22, kPart31>();
        keep_pace();
      }
      tile_store<kUpper>(qkv + out, row_bytes);
      tile_store<kLower>(qkv + kTileRows * 3 * channels_ + out, row_bytes);
    }
  }

  const ProjectedForwardCall& call_;
  const int64_t channels_, pieces_;  // pieces of 16 channels
  char *weights_, *rows_;
  float *bias_, *norm_, *panel_;  // norm_: weights, then biases
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
