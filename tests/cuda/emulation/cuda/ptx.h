// Stands in for csrc/cuda/ptx.h where kernels are compiled for the CPU: the same functions, with the fragment layouts,
// the rounding and the accuracy of the hardware (PTX ISA 9.0, sections on ldmatrix, mma.m16n8k16, ex2 and cvt).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../emulator.h"

#define __global__
#define __device__
#define __host__
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

SWIN_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
SWIN_DEVICE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SWIN_DEVICE float to_float(float x) { return x; }
SWIN_DEVICE float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
SWIN_DEVICE float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023u;
  if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
  const float magnitude = std::ldexp(static_cast<float>(exponent ? fraction | 1024u : fraction),
                                     static_cast<int>(exponent ? exponent : 1) - 25);
  return sign ? -magnitude : magnitude;
}

// The nearest value of type T, ties to even.
template <class T>
SWIN_DEVICE T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  const auto sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000u);
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  const int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  // In units of the last place, which std::nearbyint rounds to even; a carry runs into the exponent by itself.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (static_cast<uint32_t>(exponent + 14) * 1024u + units))};
}

template <class T>
SWIN_DEVICE uint32_t pack(float lower, float upper) {
  return from_float<T>(lower).bits | uint32_t{from_float<T>(upper).bits} << 16;
}
template <class T>
SWIN_DEVICE float2 unpack(uint32_t packed) {
  return {to_float(T{static_cast<uint16_t>(packed)}), to_float(T{static_cast<uint16_t>(packed >> 16)})};
}

// ---- threads -------------------------------------------------------------------------------------------------------

SWIN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
SWIN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }
SWIN_DEVICE void block_barrier() { emulation::block_barrier(); }
SWIN_DEVICE void warp_barrier() { emulation::warp_barrier(); }

// What each lane brings to an instruction of the warp, and takes from it.
template <class T>
struct Brought {
  T value;
  int lane;
  T result;
};

// Every lane gets the value of the lane that it names.
template <class T>
SWIN_DEVICE T exchange(const char* name, T value, int lane) {
  Brought<T> mine{value, lane, value};
  emulation::meet(name, &mine, [](void* const(&lanes)[32]) {
    for (void* one : lanes) {
      auto* const b = static_cast<Brought<T>*>(one);
      b->result = static_cast<Brought<T>*>(lanes[b->lane & 31])->value;
    }
  });
  return mine.result;
}
template <class T>
SWIN_DEVICE T shuffle(T value, int lane) {
  return exchange("shuffle", value, lane);
}
template <class T>
SWIN_DEVICE T shuffle_xor(T value, int mask) {
  return exchange("shuffle_xor", value, lane_index() ^ mask);
}
SWIN_DEVICE bool warp_any(bool predicate) {
  Brought<bool> mine{predicate, 0, false};
  emulation::meet("warp_any", &mine, [](void* const(&lanes)[32]) {
    bool any = false;
    for (void* one : lanes) any |= static_cast<Brought<bool>*>(one)->value;
    for (void* one : lanes) static_cast<Brought<bool>*>(one)->result = any;
  });
  return mine.result;
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

// ldmatrix of Count matrices: lane 8 m + r brings row r of matrix m; lane 4 g + t takes row g, columns 2t and 2t+1, or
// of the transposed matrix, hence of the stored one rows 2t and 2t+1 of column g.
template <int Count, bool Transposed>
struct Matrices {
  const uint16_t* row;
  uint32_t* fragment;
  static void load(void* const (&lanes)[32]) {
    const auto element = [&](int matrix, int row, int column) {
      return uint32_t{static_cast<Matrices*>(lanes[8 * matrix + row])->row[column]};
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < Count; ++m) {
        const uint32_t lower = Transposed ? element(m, 2 * t, g) : element(m, g, 2 * t);
        const uint32_t upper = Transposed ? element(m, 2 * t + 1, g) : element(m, g, 2 * t + 1);
        static_cast<Matrices*>(lanes[lane])->fragment[m] = lower | upper << 16;
      }
    }
  }
};
template <int Count, bool Transposed>
SWIN_DEVICE void load_matrices(const char* name, uint32_t (&fragment)[Count], const void* row,
                               const emulation::Site& site) {
  if (lane_index() < 8 * Count) emulation::touch_shared(row, 16, false, site);
  Matrices<Count, Transposed> mine{static_cast<const uint16_t*>(row), fragment};
  emulation::meet(name, &mine, Matrices<Count, Transposed>::load);
}
SWIN_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row,
                             emulation::Site site = emulation::Site::current()) {
  load_matrices<4, false>("ldmatrix_x4", fragment, row, site);
}
SWIN_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row,
                                   emulation::Site site = emulation::Site::current()) {
  load_matrices<4, true>("ldmatrix_x4_trans", fragment, row, site);
}
SWIN_DEVICE void ldmatrix_x2(uint32_t (&fragment)[2], const void* row,
                             emulation::Site site = emulation::Site::current()) {
  load_matrices<2, false>("ldmatrix_x2", fragment, row, site);
}
SWIN_DEVICE void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row,
                                   emulation::Site site = emulation::Site::current()) {
  load_matrices<2, true>("ldmatrix_x2_trans", fragment, row, site);
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// The sum of `sum` and 8 exact products as tensor cores take it: all cut to 24 bits below the largest, then cut again
// to float32 (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021; the A100's way).
SWIN_DEVICE float tensor_core_sum(float sum, const float* a, const float* b) {
  double terms[9], largest = std::fabs(sum);
  terms[8] = sum;
  for (int i = 0; i < 8; ++i) {
    terms[i] = static_cast<double>(a[i]) * b[i];
    largest = std::fmax(largest, std::fabs(terms[i]));
    if (!std::isfinite(terms[i])) largest = INFINITY;
  }
  double total = 0;
  if (!std::isfinite(largest) || !std::isfinite(sum)) {
    for (double term : terms) total += term;
    return static_cast<float>(total);
  }
  if (largest == 0) return 0;
  uint64_t bits;
  std::memcpy(&bits, &largest, 8);
  const uint64_t exponent =
      bits >> 52;  // of the largest, biased; products of 16-bit values are never subnormal doubles
  const uint64_t up = (2046 + 24 - exponent) << 52, down = (exponent - 24) << 52;  // 2^(24 - e) and 2^(e - 24)
  double to_units, unit;
  std::memcpy(&to_units, &up, 8);
  std::memcpy(&unit, &down, 8);
  int64_t units = 0;
  for (double term : terms) units += static_cast<int64_t>(term * to_units);  // a cast cuts towards zero
  total = static_cast<double>(units) * unit;
  const float nearest = static_cast<float>(total);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(total) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <class T>
struct Product {
  const uint32_t* a;
  uint32_t b[2];
  const float* c;
  float d[4];
  static void compute(void* const (&lanes)[32]) {
    float a[16][16], b[8][16];  // b transposed
    for (int lane = 0; lane < 32; ++lane) {
      const auto& mine = *static_cast<Product*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int half = 0; half < 2; ++half) {
        const float2 pairs[] = {unpack<T>(mine.a[2 * half]), unpack<T>(mine.a[2 * half + 1]), unpack<T>(mine.b[half])};
        const int k = 8 * half + 2 * t;
        a[g][k] = pairs[0].x, a[g][k + 1] = pairs[0].y;
        a[g + 8][k] = pairs[1].x, a[g + 8][k + 1] = pairs[1].y;
        b[g][k] = pairs[2].x, b[g][k + 1] = pairs[2].y;
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto& mine = *static_cast<Product*>(lanes[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        const float lower = tensor_core_sum(mine.c[i], a[row], b[column]);
        mine.d[i] = tensor_core_sum(lower, a[row] + 8, b[column] + 8);
      }
    }
  }
};
template <class T>
SWIN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  Product<T> mine{a, {b0, b1}, c, {}};
  emulation::meet("mma_m16n8k16", &mine, Product<T>::compute);
  std::memcpy(d, mine.d, sizeof d);
}

// Subnormal arguments and results are zero; a relative error of up to 2^-22 as PTX grants it, drawn from the argument.
SWIN_DEVICE float exp2_approx(float x) {
  if (std::fabs(x) < 0x1p-126f) return 1.0f;
  const uint32_t hash = (bits_of(x) ^ bits_of(x) >> 15) * 0x9E3779B9u;
  const double error = (static_cast<double>(hash) / 0x1p31 - 1) * 0x1p-22;
  const auto y = static_cast<float>(std::exp2(static_cast<double>(x)) * (1 + error));
  return y < 0x1p-126f ? 0.0f : y;
}

}  // namespace swin
