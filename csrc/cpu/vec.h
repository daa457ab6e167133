// Vectors of the width this file is compiled for, by the compiler's vector extensions.
// Everything here lives in one namespace per build (SWIN_ISA) and is used only by kernels.cpp and kernels_amx.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SWIN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SWIN_VECTOR_BYTES 32
#else
#define SWIN_VECTOR_BYTES 16  // SSE2, NEON: every 64-bit processor
#endif

#define SWIN_ALWAYS_INLINE inline __attribute__((always_inline))

namespace swin {
namespace SWIN_ISA {

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float Vec __attribute__((vector_size(SWIN_VECTOR_BYTES)));
  typedef int32_t Int;
  typedef int32_t IntVec __attribute__((vector_size(SWIN_VECTOR_BYTES)));
};
template <>
struct VecTypes<double> {
  typedef double Vec __attribute__((vector_size(SWIN_VECTOR_BYTES)));
  typedef int64_t Int;
  typedef int64_t IntVec __attribute__((vector_size(SWIN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecTypes<T>::Vec;
template <class T>
using IntVec = typename VecTypes<T>::IntVec;
template <class T>
constexpr int kLanes = SWIN_VECTOR_BYTES / sizeof(T);

template <class T>
SWIN_ALWAYS_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
SWIN_ALWAYS_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T, size_t... I>
SWIN_ALWAYS_INLINE Vec<T> broadcast_lanes(T x, std::index_sequence<I...>) {
  return Vec<T>{(static_cast<void>(I), x)...};
}

template <class T>
SWIN_ALWAYS_INLINE Vec<T> broadcast(T x) {
  return broadcast_lanes<T>(x, std::make_index_sequence<kLanes<T>>());
}

// combine over all lanes, halving the vector at each step.
template <class T, int kCount, class Combine>
SWIN_ALWAYS_INLINE T reduce_lanes(const T* lanes, const Combine& combine) {
  if constexpr (kCount == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(kCount / 2 * sizeof(T))));
    Half low, high;
    std::memcpy(&low, lanes, sizeof low);
    std::memcpy(&high, lanes + kCount / 2, sizeof high);
    const Half half = combine(low, high);
    return reduce_lanes<T, kCount / 2>(reinterpret_cast<const T*>(&half), combine);
  }
}

template <class T>
SWIN_ALWAYS_INLINE T sum_lanes(Vec<T> v) {
  return reduce_lanes<T, kLanes<T>>(reinterpret_cast<const T*>(&v), [](auto a, auto b) { return a + b; });
}

template <class T>
SWIN_ALWAYS_INLINE T max_lanes(Vec<T> v) {
  return reduce_lanes<T, kLanes<T>>(reinterpret_cast<const T*>(&v), [](auto a, auto b) { return a > b ? a : b; });
}

// The larger of each lane; b where either is NaN. (GCC compiles the conditional to a comparison and a blend.)
template <class T>
SWIN_ALWAYS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_max_ps(a, 0xFFFF, a, b);  // _mm512_max_ps warns in GCC 12
  if constexpr (sizeof(T) == 8) return _mm512_mask_max_pd(a, 0xFF, a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_max_ps(a, b);
  if constexpr (sizeof(T) == 8) return _mm256_max_pd(a, b);
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_max_ps(a, b);
  if constexpr (sizeof(T) == 8) return _mm_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// Constants of powers_of_two. kRounder = 1.5 · 2^(mantissa bits) + kBias: adding it rounds to an integer
// and leaves that integer, biased as an exponent is, in the low bits. The polynomials minimise the relative error of
// 2^f on [-1/2, 1/2] (Remez exchange): 7.5e-8 for float, 3.1e-18 for double.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int kMantissaBits = 23, kBias = 127, kDegree = 5;
  static constexpr float kRounder = 12582912.0f + kBias;
  static constexpr float kCoefficients[kDegree + 1] = {1.00000007165471414f,    0.693146967065035214f,
                                                       0.240221197237107196f,   0.055507132718556442f,
                                                       0.00967554134312132739f, 0.00132764726319508761f};
};
template <>
struct Exp2<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023, kDegree = 11;
  static constexpr double kRounder = 6755399441055744.0 + kBias;
  static constexpr double kCoefficients[kDegree + 1] = {
      0.999999999999999997,   0.69314718055994533,    0.240226506959101562,    0.0555041086648199216,
      0.00961812910758833524, 0.00133335581467899217, 0.000154035304625144321, 0.0000152527334899885256,
      1.32154330896763992e-6, 1.01781980216719308e-7, 7.0741056135081428e-9,   4.43528270695727715e-10};
};

#ifdef __AVX512DQ__
// 2^f on [0, 1), the polynomial of Exp2<float> about 1/2.
constexpr float kExp2OfFraction[6] = {0.9999999250637599f,  0.6931530732070963f,   0.2401536169827236f,
                                      0.05582631823168339f, 0.008989339876598737f, 0.0018775767656580152f};

// 2^x for any x in seven instructions: x - floor(x) and the scaling by 2^floor(x) take one each, and the scaling
// rounds, overflows and underflows correctly.
template <int kCount>
SWIN_ALWAYS_INLINE void exp2_by_scaling(__m512 (&x)[kCount]) {
  constexpr int kDown = 1;  // rounding mode
  __m512 fraction[kCount], p[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    fraction[i] = _mm512_maskz_reduce_ps(0xFFFF, x[i], kDown);
    p[i] = _mm512_set1_ps(kExp2OfFraction[5]);
  }
#pragma GCC unroll 8
  for (int c = 4; c >= 0; --c) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = _mm512_fmadd_ps(p[i], fraction[i], _mm512_set1_ps(kExp2OfFraction[c]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) x[i] = _mm512_maskz_scalef_ps(0xFFFF, p[i], x[i]);
}
#endif

// x[i] = 2^x[i] for x < 127: about one unit in the last place; 0 below the smallest normal number; NaN for
// NaN. 2^x = 2^n · 2^f with n = round(x) and |f| ≤ 1/2. Several vectors are computed together: each step
// waits for the one before, and the other vectors fill the wait.
template <class T, int kCount>
SWIN_ALWAYS_INLINE void powers_of_two(Vec<T> (&x)[kCount]) {
#ifdef __AVX512DQ__
  if constexpr (sizeof(T) == sizeof(float)) return exp2_by_scaling(reinterpret_cast<__m512(&)[kCount]>(x));
#endif
  using C = Exp2<T>;
  const Vec<T> lowest = broadcast(static_cast<T>(-C::kBias)), rounder = broadcast(C::kRounder);
  Vec<T> rounded[kCount], p[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    x[i] = max<T>(lowest, x[i]);  // in this order a NaN stays
    rounded[i] = x[i] + rounder;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    x[i] -= rounded[i] - rounder;
    p[i] = broadcast(C::kCoefficients[C::kDegree]);
  }
#pragma GCC unroll 16
  for (int c = C::kDegree - 1; c >= 0; --c) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + broadcast(C::kCoefficients[c]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    const IntVec<T> exponent = reinterpret_cast<IntVec<T>>(rounded[i]) << C::kMantissaBits;
    x[i] = p[i] * reinterpret_cast<Vec<T>>(exponent);
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
