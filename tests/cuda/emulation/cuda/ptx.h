// Stands in for csrc/cuda/ptx.h where kernels are compiled for the CPU: the same functions, with the fragment layouts,
// the rounding and the accuracy of the hardware (PTX ISA 9.0, sections on ldmatrix, mma.m16n8k16, ex2 and cvt).
#pragma once

#include <bit>
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
