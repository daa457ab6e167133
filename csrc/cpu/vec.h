// Vectors of the width this file is compiled for, by the compiler's vector extensions.
// Everything here lives in a namespace of its own per build (SWIN_ISA) and is used by kernels.cpp alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

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

template <class T>
SWIN_ALWAYS_INLINE T sum_lanes(Vec<T> v) {
  T s = v[0];
  for (int i = 1; i < kLanes<T>; ++i) s += v[i];
  return s;
}

template <class T>
SWIN_ALWAYS_INLINE T max_lanes(Vec<T> v) {
  T m = v[0];
  for (int i = 1; i < kLanes<T>; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

template <class T>
SWIN_ALWAYS_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Constants of exp2_nonpositive. kRounder = 1.5 · 2^(mantissa bits): adding it rounds to an integer and
// leaves that integer in the low bits. The polynomials minimise the relative error of 2^f on
// [-1/2, 1/2] (Remez exchange): 7.5e-8 for float, 3.1e-18 for double.
template <class T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int kMantissaBits = 23, kBias = 127, kDegree = 5;
  static constexpr float kRounder = 12582912.0f;
  static constexpr float kCoefficients[kDegree + 1] = {1.00000007165471414f,     0.693146967065035214f,
                                                       0.240221197237107196f,    0.055507132718556442f,
                                                       0.00967554134312132739f, 0.00132764726319508761f};
};
template <>
struct Exp2<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023, kDegree = 11;
  static constexpr double kRounder = 6755399441055744.0;
  static constexpr double kCoefficients[kDegree + 1] = {
      0.999999999999999997,     0.69314718055994533,      0.240226506959101562,     0.0555041086648199216,
      0.00961812910758833524,   0.00133335581467899217,   0.000154035304625144321,  0.0000152527334899885256,
      1.32154330896763992e-6,   1.01781980216719308e-7,   7.0741056135081428e-9,    4.43528270695727715e-10};
};

// 2^x for x ≤ 0: about one unit in the last place; 0 below the smallest normal number; NaN for NaN.
// 2^x = 2^n · 2^f with n = round(x) and |f| ≤ 1/2.
template <class T>
SWIN_ALWAYS_INLINE Vec<T> exp2_nonpositive(Vec<T> x) {
  using C = Exp2<T>;
  const Vec<T> lowest = broadcast(static_cast<T>(-C::kBias)), rounder = broadcast(C::kRounder);
  x = lowest > x ? lowest : x;  // this way round a NaN stays
  const Vec<T> rounded = x + rounder;
  const Vec<T> f = x - (rounded - rounder);
  Vec<T> p = broadcast(C::kCoefficients[C::kDegree]);
#pragma GCC unroll 16
  for (int i = C::kDegree - 1; i >= 0; --i) p = p * f + broadcast(C::kCoefficients[i]);
  const IntVec<T> exponent = (reinterpret_cast<IntVec<T>>(rounded) + C::kBias) << C::kMantissaBits;
  return p * reinterpret_cast<Vec<T>>(exponent);
}

}  // namespace SWIN_ISA
}  // namespace swin
