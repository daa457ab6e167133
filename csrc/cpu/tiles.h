// The three matrix products of attention on a tile of kRows query rows, and the softmax row pass.
// Rows of scores are padded to whole vectors; every function works on columns [begin, end), multiples
// of the vector's lanes.
#pragma once

#include "vec.h"

namespace swin {
namespace SWIN_ISA {

constexpr int kRows = 6;  // with kColumnVectors accumulators each: as many as the registers hold
template <class T>
constexpr int kColumnVectors = SWIN_VECTOR_BYTES == 64 ? 4 : 2;

// finish(row, column, Σ_d rows[d][row] · columns[d][column], init(row, column) included) for a block.
template <class T, int kWidth, class Init, class Finish>
SWIN_ALWAYS_INLINE void product_block(const T* rows, const T* columns, int64_t stride, int64_t depth, int64_t column,
                                      const Init& init, const Finish& finish) {
  Vec<T> acc[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) acc[r][c] = init(r, column + c * kLanes<T>);
  for (int64_t d = 0; d < depth; ++d) {
    Vec<T> b[kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) b[c] = load(columns + d * stride + column + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> a = broadcast(rows[d * kRows + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) acc[r][c] += a * b[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) finish(r, column + c * kLanes<T>, acc[r][c]);
}

// rows (depth, kRows)ᵀ · columns (depth, stride) over columns [begin, end).
template <class T, class Init, class Finish>
SWIN_ALWAYS_INLINE void product_rows(const T* rows, const T* columns, int64_t stride, int64_t depth, int64_t begin,
                                     int64_t end, const Init& init, const Finish& finish) {
  constexpr int kWide = kColumnVectors<T>;
  int64_t column = begin;
  for (; column + kWide * kLanes<T> <= end; column += kWide * kLanes<T>)
    product_block<T, kWide>(rows, columns, stride, depth, column, init, finish);
  for (; column < end; column += kLanes<T>)
    product_block<T, 1>(rows, columns, stride, depth, column, init, finish);
}

// sums (kRows, width) = Σ_k weights[row][k] · values[k] over keys [begin, end); width in whole vectors.
template <class T, int kWidth, int kUnroll>
SWIN_ALWAYS_INLINE void weighted_sum_block(const T* weights, int64_t stride, const T* values, int64_t width,
                                           int64_t begin, int64_t end, T* sums) {
  Vec<T> acc[kUnroll][kRows][kWidth] = {};
  for (int64_t k = begin; k < end; k += kUnroll) {
#pragma GCC unroll 2
    for (int u = 0; u < kUnroll; ++u) {
      Vec<T> v[kWidth];
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) v[c] = load(values + (k + u) * width + c * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> w = broadcast(weights[r * stride + k + u]);
#pragma GCC unroll 4
        for (int c = 0; c < kWidth; ++c) acc[u][r][c] += w * v[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) {
      Vec<T> s = acc[0][r][c];
      for (int u = 1; u < kUnroll; ++u) s += acc[u][r][c];
      store(sums + r * width + c * kLanes<T>, s);
    }
}

template <class T>
SWIN_ALWAYS_INLINE void weighted_sum(const T* weights, int64_t stride, const T* values, int64_t width, int64_t begin,
                                     int64_t end, T* sums) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= width; c += 2 * kLanes<T>)
    weighted_sum_block<T, 2, 1>(weights, stride, values + c, width, begin, end, sums + c);
  if (c < width)  // one vector wide: two keys at a time keep the multipliers busy
    weighted_sum_block<T, 1, 2>(weights, stride, values + c, width, begin, end, sums + c);
}

// sums[k] += Σ_row weights[row][k] · rows[row] over keys [begin, end); width in whole vectors.
template <class T, int kWidth>
SWIN_ALWAYS_INLINE void scatter_rows_block(const T* weights, int64_t stride, const T* rows, int64_t width,
                                           int64_t begin, int64_t end, T* sums) {
  Vec<T> x[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) x[r][c] = load(rows + r * width + c * kLanes<T>);
  for (int64_t k = begin; k < end; ++k) {
    Vec<T> acc[kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) acc[c] = load(sums + k * width + c * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> w = broadcast(weights[r * stride + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) acc[c] += w * x[r][c];
    }
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) store(sums + k * width + c * kLanes<T>, acc[c]);
  }
}

template <class T>
SWIN_ALWAYS_INLINE void scatter_rows(const T* weights, int64_t stride, const T* rows, int64_t width, int64_t begin,
                                     int64_t end, T* sums) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= width; c += 2 * kLanes<T>)
    scatter_rows_block<T, 2>(weights, stride, rows + c, width, begin, end, sums + c);
  if (c < width) scatter_rows_block<T, 1>(weights, stride, rows + c, width, begin, end, sums + c);
}

// row[k] = 2^(row[k] - offset) over [begin, end); returns the sum.
template <class T>
SWIN_ALWAYS_INLINE T exp2_row(T* row, T offset, int64_t begin, int64_t end) {
  const Vec<T> o = broadcast(offset);
  Vec<T> sum = {};
#pragma GCC unroll 4
  for (int64_t k = begin; k < end; k += kLanes<T>) {
    const Vec<T> e = exp2_nonpositive<T>(load(row + k) - o);
    store(row + k, e);
    sum += e;
  }
  return sum_lanes<T>(sum);
}

}  // namespace SWIN_ISA
}  // namespace swin
