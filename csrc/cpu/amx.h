// Intel AMX: eight tile registers of 16 rows of 64 bytes, and products of tiles of bfloat16 summed in float32.
//
// float32 numbers become bfloat16 parts: x = x1 + x2 + x3 exactly, by cutting eight bits of the mantissa at a time. Of
// the nine products of parts of two numbers, the six large enough to matter in float32 are summed.
//
// A tile of the left side holds rows of 32 bfloat16; one of the right side holds pairs: row i, column n holds elements
// (2i, n) and (2i + 1, n) of the right matrix. pack_pairs makes such rows from two vectors of float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {

constexpr int kTileRows = 16, kTileBytes = 1024, kTileRowBytes = 64;

// Inline assembly, because the compilers' intrinsics do not say that loading a tile reads memory.
template <int kTile>
SWIN_ALWAYS_INLINE void tile_load(const void* rows, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
}

template <int kTile>
SWIN_ALWAYS_INLINE void tile_store(void* rows, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
}

template <int kTile>
SWIN_ALWAYS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// sums += left · right.
template <int kSums, int kLeft, int kRight>
SWIN_ALWAYS_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// All tiles at full size, for the life of this object on this thread.
class TileUse {
 public:
  TileUse() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes,
                                kTileRowBytes, kTileRowBytes, kTileRowBytes, kTileRowBytes};
      uint8_t rows[16] = {kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows, kTileRows};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileUse() { asm volatile("tilerelease"); }
  TileUse(const TileUse&) = delete;
  TileUse& operator=(const TileUse&) = delete;
};

// The parts of 16 numbers, each in the upper half of its lane, over zeros.
struct Parts {
  __m512 first, second, third;
};

SWIN_ALWAYS_INLINE Parts split(__m512 x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xFFFF0000u));
  Parts parts;
  parts.first = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper));
  const __m512 rest = x - parts.first;
  parts.second = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(rest), upper));
  parts.third = rest - parts.second;
  return parts;
}

// Lane i: the upper half of x[i] below that of y[i]. The lower halves of both are zero.
SWIN_ALWAYS_INLINE __m512i pack_pairs(__m512 x, __m512 y) {
  const __m512i moved = _mm512_alignr_epi8(_mm512_castps_si512(x), _mm512_castps_si512(x), 2);
  return _mm512_or_si512(moved, _mm512_castps_si512(y));
}

// The upper halves of 16 lanes.
SWIN_ALWAYS_INLINE __m256i upper_halves(__m512 x) {
  return _mm512_maskz_cvtepi32_epi16(0xFFFF, _mm512_maskz_srli_epi32(0xFFFF, _mm512_castps_si512(x), 16));
}

// A row of 16 numbers as row `i` of three tiles of the left side: parts 1 1, 2 2 and 1 3 side by side.
SWIN_ALWAYS_INLINE void split_left_row(__m512 x, int64_t i, char* tiles) {
  const Parts parts = split(x);
  const __m256i one = upper_halves(parts.first), two = upper_halves(parts.second), three = upper_halves(parts.third);
  __m256i* row = reinterpret_cast<__m256i*>(tiles + i * kTileRowBytes);
  _mm256_store_si256(row, one);
  _mm256_store_si256(row + 1, one);
  _mm256_store_si256(row + kTileBytes / 32, two);
  _mm256_store_si256(row + kTileBytes / 32 + 1, two);
  _mm256_store_si256(row + 2 * kTileBytes / 32, one);
  _mm256_store_si256(row + 2 * kTileBytes / 32 + 1, three);
}

// A panel (16, 16) of numbers, columns of the right matrix, as half tiles of parts 3, 1, 2: two tiles that overlap, 3
// over 1 and 1 over 2, so that the products with the left side's 1 3, 1 1 and 2 2 are the six wanted.
constexpr int64_t kRightBlockBytes = 3 * kTileBytes / 2;
SWIN_ALWAYS_INLINE void split_right_block(const float* panel, char* halves) {
  for (int d = 0; d < kTileRows; d += 2) {
    const Parts x = split(load(panel + d * kTileRows)), y = split(load(panel + (d + 1) * kTileRows));
    char* row = halves + d / 2 * kTileRowBytes;
    _mm512_store_si512(row, pack_pairs(x.third, y.third));
    _mm512_store_si512(row + kTileBytes / 2, pack_pairs(x.first, y.first));
    _mm512_store_si512(row + kTileBytes, pack_pairs(x.second, y.second));
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
