// Stands in for csrc/cuda/ptx.h where kernels are compiled for the CPU: the same functions, with the fragment layouts,
// the rounding and the accuracy of the hardware (PTX ISA 9.0, sections on ldmatrix, mma.m16n8k16, ex2 and cvt).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "../emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define SWIN_DEVICE static inline
#define SWIN_UNROLL
#define SWIN_NO_UNROLL

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace swin {

// ---- 16-bit values -------------------------------------------------------------------------------------------------

SWIN_DEVICE uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
SWIN_DEVICE float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;

SWIN_DEVICE float to_float(float x) { return x; }
SWIN_DEVICE float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
SWIN_DEVICE float to_float(Float16 x) { return static_cast<float>(x); }

// The nearest value of type T, ties to even.
template <class T>
SWIN_DEVICE T from_float(float x) {
  return static_cast<T>(x);
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
SWIN_DEVICE uint32_t pack(float lower, float upper) {
  const auto bits = [](float x) { return uint32_t{std::bit_cast<uint16_t>(from_float<T>(x))}; };
  return bits(lower) | bits(upper) << 16;
}
template <class T>
SWIN_DEVICE float2 unpack(uint32_t packed) {
  const auto value = [](uint32_t bits) { return to_float(std::bit_cast<T>(static_cast<uint16_t>(bits))); };
  return {value(packed), value(packed >> 16)};
}

// ---- threads -------------------------------------------------------------------------------------------------------

SWIN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
SWIN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
SWIN_DEVICE int kept(int value) { return value; }
SWIN_DEVICE void block_barrier() { emulation::block_barrier(); }
SWIN_DEVICE void warp_barrier() { emulation::warp_barrier(); }

// What all lanes bring, by lane.
template <class T>
SWIN_DEVICE const T* gather(const char* name, const T& mine) {
  static_assert(sizeof(T) <= emulation::kMostBrought);
  return static_cast<const T*>(emulation::gather(name, &mine, sizeof(T)));
}
template <class T>
SWIN_DEVICE T shuffle(T value, int lane) {
  return gather("shuffle", value)[lane & 31];
}
template <class T>
SWIN_DEVICE T shuffle_xor(T value, int mask) {
  return gather("shuffle_xor", value)[lane_index() ^ mask];
}
SWIN_DEVICE bool warp_any(bool predicate) {
  const bool* const all = gather("warp_any", predicate);
  return std::any_of(all, all + 32, [](bool one) { return one; });
}

// ---- shared memory -------------------------------------------------------------------------------------------------

SWIN_DEVICE unsigned char* shared_memory() { return emulation::shared_memory(); }

template <class T>
SWIN_DEVICE T load_shared(const T* pointer, emulation::Site site = emulation::Site::current()) {
  emulation::touch_shared(pointer, sizeof(T), false, site);
  return *pointer;
}
template <class T>
SWIN_DEVICE void store_shared(T* pointer, T value, emulation::Site site = emulation::Site::current()) {
  emulation::touch_shared(pointer, sizeof(T), true, site);
  *pointer = value;
}

SWIN_DEVICE void cp_async_16(void* shared, const void* global, bool valid,
                             emulation::Site site = emulation::Site::current()) {
  emulation::copy_later(shared, global, valid, site);
}
SWIN_DEVICE void cp_async_commit() { emulation::close_copies(); }
template <int Groups>
SWIN_DEVICE void cp_async_wait() {
  emulation::finish_copies(Groups);
}

// Lane 8 m + r brings row r of matrix m; lane 4 g + t takes row g, columns 2t and 2t+1, or of the transposed matrix,
// hence of the stored one rows 2t and 2t+1 of column g.
template <int Count, bool Transposed>
SWIN_DEVICE void load_matrices(const char* name, uint32_t (&fragment)[Count], const void* row,
                               const emulation::Site& site) {
  struct Row {
    uint16_t value[8];
  } mine = {};
  if (lane_index() < 8 * Count) {
    emulation::touch_shared(row, 16, false, site);
    mine = *static_cast<const Row*>(row);
  }
  const Row* const rows = gather(name, mine);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int m = 0; m < Count; ++m) {
    const uint32_t lower = Transposed ? rows[8 * m + 2 * t].value[g] : rows[8 * m + g].value[2 * t];
    const uint32_t upper = Transposed ? rows[8 * m + 2 * t + 1].value[g] : rows[8 * m + g].value[2 * t + 1];
    fragment[m] = lower | upper << 16;
  }
}
#define LDMATRIX(name, count, transposed)                                    \
  SWIN_DEVICE void name(uint32_t (&fragment)[count], const void* row,        \
                        emulation::Site site = emulation::Site::current()) { \
    load_matrices<count, transposed>(#name, fragment, row, site);            \
  }
LDMATRIX(ldmatrix_x4, 4, false)
LDMATRIX(ldmatrix_x4_trans, 4, true)
LDMATRIX(ldmatrix_x2, 2, false)
LDMATRIX(ldmatrix_x2_trans, 2, true)
#undef LDMATRIX

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// `sum` and 8 exact products as tensor cores add them: each cut to 24 bits below the largest, the total to a float32
// (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021; the A100's way).
SWIN_DEVICE float tensor_core_sum(float sum, const float* a, const float* b) {
  double terms[9] = {sum}, largest = std::fabs(sum), plain = sum;
  for (int i = 0; i < 8; ++i) {
    terms[i + 1] = static_cast<double>(a[i]) * b[i];
    plain += terms[i + 1];
    largest = std::fmax(largest, std::fabs(terms[i + 1]));
  }
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  const uint64_t exponent = std::bit_cast<uint64_t>(largest) >> 52;  // biased by 1023
  const auto unit = std::bit_cast<double>((exponent - 24) << 52),
             inverse = std::bit_cast<double>((2070 - exponent) << 52);
  int64_t units = 0;
  for (double term : terms) units += static_cast<int64_t>(term * inverse);  // cut towards zero
  const auto bits = std::bit_cast<uint64_t>(static_cast<double>(units) * unit);
  return static_cast<float>(std::bit_cast<double>(bits >> 29 << 29));  // the 24 bits of a float32
}

// D = A B + C with A (16, 8 Halves) and B (8 Halves, 8); a half is 8 columns of A.
template <class T, int Halves>
SWIN_DEVICE void multiply(const char* name, float (&d)[4], const uint32_t* a, const uint32_t* b, const float (&c)[4]) {
  struct Factors {
    uint32_t a[2 * Halves], b[Halves];
  } mine;
  std::copy_n(a, 2 * Halves, mine.a), std::copy_n(b, Halves, mine.b);
  const Factors* const all = gather(name, mine);
  const int g = lane_index() / 4, t = lane_index() % 4;
  for (int i = 0; i < 4; ++i) {  // of D: row g + i / 2 * 8, column 2t + i % 2
    float sum = c[i];
    for (int half = 0; half < Halves; ++half) {
      float row[8], column[8];
      for (int k = 0; k < 8; k += 2) {
        const float2 left = unpack<T>(all[4 * g + k / 2].a[2 * half + i / 2]);
        const float2 right = unpack<T>(all[4 * (2 * t + i % 2) + k / 2].b[half]);
        row[k] = left.x, row[k + 1] = left.y, column[k] = right.x, column[k + 1] = right.y;
      }
      sum = tensor_core_sum(sum, row, column);
    }
    d[i] = sum;
  }
}
template <class T>
SWIN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  const uint32_t b[2] = {b0, b1};
  multiply<T, 2>("mma_m16n8k16", d, a, b, c);
}
template <class T>
SWIN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]) {
  multiply<T, 1>("mma_m16n8k8", d, a, &b, c);
}

// A number from -1 to 1 that is drawn from the argument, to err by.
SWIN_DEVICE double drawn_from(float x) {
  const uint32_t hash = (bits_of(x) ^ bits_of(x) >> 15) * 0x9E3779B9u;
  return static_cast<double>(hash) / 0x1p31 - 1;
}
SWIN_DEVICE float flushed(double x) {
  return std::fabs(static_cast<float>(x)) < 0x1p-126f ? 0.0f : static_cast<float>(x);
}

// Subnormal arguments and results are zero; errors are up to what PTX grants.
SWIN_DEVICE float exp2_approx(float x) {
  return x = flushed(x), x == 0 ? 1.0f : flushed(std::exp2(static_cast<double>(x)) * (1 + drawn_from(x) * 0x1p-22));
}
SWIN_DEVICE float log2_approx(float x) {
  const double y = std::log2(static_cast<double>(flushed(x))), error = drawn_from(x) * 0x1p-22;
  return x == 1 ? 0.0f : flushed(x > 0.5f && x < 2 ? y + error : y * (1 + error));
}
SWIN_DEVICE float reciprocal_approx(float x) {
  return flushed(1 / static_cast<double>(flushed(x)) * (1 + drawn_from(x) * 0x1p-23));
}

}  // namespace swin
