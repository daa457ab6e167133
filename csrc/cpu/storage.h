// Rows of stored elements (float32, float64, bfloat16, float16) to and from arithmetic precision.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/types.h"
#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {

SWIN_ALWAYS_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

SWIN_ALWAYS_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

SWIN_ALWAYS_INLINE float from_bfloat16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN becomes the quiet NaN.
SWIN_ALWAYS_INLINE uint16_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? 0x7FC0u : rounded);
}

// Half precision by arithmetic on the bits of a float: the exponent is rebiased by a multiplication, so
// that subnormals come out right (F. Giesen, "half_to_float_fast5"); infinity and NaN are put back.
SWIN_ALWAYS_INLINE float from_float16(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const float scaled = float_of(magnitude) * float_of((254u - 15u) << 23);
  const uint32_t special = magnitude >= (31u << 23) ? 255u << 23 : 0u;
  return float_of(bits_of(scaled) | special | sign);
}

// Round to nearest even, overflow to infinity, subnormals kept. ("float_to_half_fast3_rtne", F. Giesen.)
SWIN_ALWAYS_INLINE uint16_t to_float16(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t u = bits_of(x) & 0x7FFFFFFFu;
  uint32_t half;
  if (u >= (127u + 16u) << 23) {
    half = u > 255u << 23 ? 0x7E00u : 0x7C00u;
  } else if (u < 113u << 23) {
    const uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
    half = bits_of(float_of(u) + float_of(magic)) - magic;
  } else {
    half = (u + ((15u - 127u) << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(half | sign);
}

SWIN_ALWAYS_INLINE int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// Element `index` of an array of `type`.
SWIN_ALWAYS_INLINE const void* at(const void* array, ElementType type, int64_t index) {
  return static_cast<const char*>(array) + index * element_bytes(type);
}
SWIN_ALWAYS_INLINE void* at(void* array, ElementType type, int64_t index) {
  return static_cast<char*>(array) + index * element_bytes(type);
}

template <class T>
SWIN_ALWAYS_INLINE void load_row(const void* from, ElementType type, int64_t count, T* to) {
  switch (type) {
    case ElementType::kFloat64:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(static_cast<const double*>(from)[i]);
      break;
    case ElementType::kFloat32:
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<const float*>(from)[i];
      break;
    case ElementType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(static_cast<const uint16_t*>(from)[i]);
      break;
    case ElementType::kFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = from_float16(static_cast<const uint16_t*>(from)[i]);
      break;
  }
}

// to = from · factor, in whole vectors as far as they go: the compiler does not vectorise it by itself, because a store
// might change the array being read.
template <class T>
SWIN_ALWAYS_INLINE void scale_row(const T* from, T factor, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(to + i, load(from + i) * broadcast(factor));
  for (; i < count; ++i) to[i] = from[i] * factor;
}

template <class T>
SWIN_ALWAYS_INLINE void store_row(const T* from, T factor, ElementType type, int64_t count, void* to) {
  switch (type) {
    case ElementType::kFloat64:
      if constexpr (sizeof(T) == sizeof(double))
        scale_row(from, factor, count, static_cast<double*>(to));
      else
        for (int64_t i = 0; i < count; ++i) static_cast<double*>(to)[i] = from[i] * factor;
      break;
    case ElementType::kFloat32:
      if constexpr (sizeof(T) == sizeof(float))
        scale_row(from, factor, count, static_cast<float*>(to));
      else
        for (int64_t i = 0; i < count; ++i) static_cast<float*>(to)[i] = static_cast<float>(from[i] * factor);
      break;
    case ElementType::kBFloat16:
      for (int64_t i = 0; i < count; ++i)
        static_cast<uint16_t*>(to)[i] = to_bfloat16(static_cast<float>(from[i] * factor));
      break;
    case ElementType::kFloat16:
      for (int64_t i = 0; i < count; ++i)
        static_cast<uint16_t*>(to)[i] = to_float16(static_cast<float>(from[i] * factor));
      break;
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
