// qkv = x · weightᵀ + bias on AMX, for the tokens of one window at a time.
#pragma once

#include "amx.h"
#include "kernels.h"
#include "tiles.h"
#include "window_attention.h"

namespace swin {
namespace SWIN_ISA {

class AmxProjection {
 public:
  AmxProjection(const ProjectedForwardCall& call, Arena& arena)
      : call_(call),
        channels_(call.heads * call.head_dim),
        pieces_(channels_ / kTileRows),
        weights_(arena.take<char>(3 * pieces_ * pieces_ * kRightBlockBytes)),
        rows_(arena.take<char>(2 * pieces_ * kLeftBytes)),
        bias_(arena.take<float>(3 * channels_)),
        panel_(arena.take<float>(kTileRows * kTileRows)) {}

  // Rows of a window's qkv, with room for the last 32.
  static int64_t padded_rows(int64_t tokens) { return round_up(tokens, 2 * kTileRows); }

  void prepare() {
    for (int64_t i = 0; i < 3 * channels_; ++i) bias_[i] = call_.bias ? call_.bias[i] : 0;
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
    for (int64_t first = 0; first < count; first += 2 * kTileRows) {
      for (int64_t i = 0; i < 2 * kTileRows; ++i) {
        const int64_t token = first + i < count ? tokens[first + i] : -1;
        char* tiles = rows_ + i / kTileRows * pieces_ * kLeftBytes;
        for (int64_t piece = 0; piece < pieces_; ++piece)
          split_left_row(token < 0 ? _mm512_setzero_ps() : load(call_.x + token * channels_ + piece * kTileRows),
                         i % kTileRows, tiles + piece * kLeftBytes);
      }
      multiply(qkv + first * 3 * channels_);
    }
  }

 private:
  static constexpr int64_t kLeftBytes = 3 * kTileBytes;

  // 32 rows: two tiles of sums share every tile of weights.
  void multiply(float* qkv) const {
    enum Tile { kUpper, kLower, kUpper11, kUpper22, kLower11, kLower22, kPart12, kPart31 };
    const int64_t row_bytes = 3 * channels_ * static_cast<int64_t>(sizeof(float));
    const char* weights = weights_;
    for (int64_t out = 0; out < 3 * channels_; out += kTileRows) {
      tile_load<kUpper>(bias_ + out, 0);
      tile_load<kLower>(bias_ + out, 0);
      for (int64_t piece = 0; piece < pieces_; ++piece, weights += kRightBlockBytes) {
        const char *upper = rows_ + piece * kLeftBytes, *lower = rows_ + (pieces_ + piece) * kLeftBytes;
        tile_load<kPart12>(weights + kTileBytes / 2, kTileRowBytes);
        tile_load<kUpper22>(upper + kTileBytes, kTileRowBytes);
        tile_multiply<kUpper, kUpper22, kPart12>();
        tile_load<kLower22>(lower + kTileBytes, kTileRowBytes);
        tile_multiply<kLower, kLower22, kPart12>();
        tile_load<kUpper11>(upper, kTileRowBytes);
        tile_multiply<kUpper, kUpper11, kPart12>();
        tile_load<kLower11>(lower, kTileRowBytes);
        tile_multiply<kLower, kLower11, kPart12>();
        tile_load<kPart31>(weights, kTileRowBytes);
        tile_load<kUpper22>(upper + 2 * kTileBytes, kTileRowBytes);
        tile_multiply<kUpper, kUpper22, kPart31>();
        tile_load<kLower22>(lower + 2 * kTileBytes, kTileRowBytes);
        tile_multiply<kLower, kLower22, kPart31>();
      }
      tile_store<kUpper>(qkv + out, row_bytes);
      tile_store<kLower>(qkv + kTileRows * 3 * channels_ + out, row_bytes);
    }
  }

  const ProjectedForwardCall& call_;
  const int64_t channels_, pieces_;  // pieces of 16 channels
  char *weights_, *rows_;
  float *bias_, *panel_;
};

}  // namespace SWIN_ISA
}  // namespace swin
