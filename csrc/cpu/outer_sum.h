// Sums of outer products on a tile of registers: how gradients of weights are accumulated.
#pragma once

#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {

// sums[row][column] += Σ_t left[t][row] · right[t][column] over t in [0, count), kRowCount rows and kWidth vectors.
template <class T, int kRowCount, int kWidth>
SWIN_ALWAYS_INLINE void outer_sum_block(const T* left, int64_t left_stride, const T* right, int64_t right_stride,
                                        int64_t count, T* sums, int64_t sums_stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r)  // they may lie far away, and are needed last
    for (int c = 0; c < kWidth; ++c) __builtin_prefetch(sums + r * sums_stride + c * kLanes<T>, 1);
  Vec<T> acc[kRowCount][kWidth] = {};
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> b[kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) b[c] = load(right + t * right_stride + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRowCount; ++r) {
      const Vec<T> a = broadcast(left[t * left_stride + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) acc[r][c] += a * b[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRowCount; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) {
      T* sum = sums + r * sums_stride + c * kLanes<T>;
      store(sum, load(sum) + acc[r][c]);
    }
}

}  // namespace SWIN_ISA
}  // namespace swin
