// Intel AMX: eight tile registers of 16 rows of 64 bytes, and products of tiles of bfloat16 summed in float32.
//
// float32 numbers become bfloat16 parts: x = x1 + x2 + x3 exactly, by cutting eight bits of the mantissa at a time. Of
// the nine products of parts of two numbers, the six that float32 would notice are summed.
//
// A tile of the left side holds rows of 32 bfloat16; one of the right side holds pairs: row i, column n holds elements
// (2i, n) and (2i + 1, n) of the right matrix. pack_pairs makes such rows from two vectors of float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "vec.h"

namespace swin {
namespace SWIN_ISA {

constexpr int kTileRows = 16, kTileBytes = 1024, kTileRowBytes = 64;

// Inline assembly, because the compilers' intrinsics do not say that loading a tile reads memory.
template <int kTile>
SWIN_ALWAYS_INLINE void tile_load(const void* rows, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(row_bytes), "i"(kTile) : "memory");
}

template <int kTile>
SWIN_ALWAYS_INLINE void tile_store(void* rows) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(int64_t{kTileRowBytes}), "i"(kTile) : "memory");
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

}  // namespace SWIN_ISA
}  // namespace swin
