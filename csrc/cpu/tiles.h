// The three matrix products of attention on a tile of kRows query rows, and the softmax row pass.
// Rows of a tile are padded to whole vectors; every function works on columns [begin, end), multiples of
// the vector's lanes. Keys (and values, for the backward) that are multiplied column by column lie in
// panels of kPanel tokens, (panels, head_dim, kPanel), so that they are read in one forward stream.
#pragma once

#include <cstring>

#include "cpu/outer_sum.h"
#include "cpu/vec.h"
#include "cpu/window_plan.h"

namespace swin {
namespace SWIN_ISA {

constexpr int kRows = 6;  // with kColumnVectors accumulators each: as many as the registers hold
template <class T>
constexpr int kColumnVectors = SWIN_VECTOR_BYTES == 64 ? 4 : 2;

constexpr int kPanel = kTokenAlignment;

// For a block of columns (kDepth is depth where it is known to the compiler, or 0): finish(row, column, sums), where
// sums are the kWidth vectors from that column on of init(row, column) + Σ_d rows[row][d] · panels[d][column].
template <int kDepth, int kWidth, class T, class Init, class Finish>
SWIN_ALWAYS_INLINE void product_block(const T* rows, int64_t row_stride, const T* panels, int64_t depth, int64_t column,
                                      const Init& init, const Finish& finish) {
  const T* b_column[kWidth];
#pragma GCC unroll 4
  for (int c = 0; c < kWidth; ++c) {
    const int64_t at = column + c * kLanes<T>;
    b_column[c] = panels + at / kPanel * kPanel * depth + at % kPanel;
  }
  Vec<T> acc[kRows][kWidth];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) acc[r][c] = init(r, column + c * kLanes<T>);
  const auto accumulate = [&](int64_t d) __attribute__((always_inline)) {
    Vec<T> b[kWidth];
#pragma GCC unroll 4
    for (int c = 0; c < kWidth; ++c) b[c] = load(b_column[c] + d * kPanel);
    __builtin_prefetch(b_column[0] + (depth + d) * kPanel);  // the next panel
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> a = broadcast(rows[r * row_stride + d]);
#pragma GCC unroll 4
      for (int c = 0; c < kWidth; ++c) acc[r][c] += a * b[c];
    }
  };
  if constexpr (kDepth > 0) {
#pragma GCC unroll 16
    for (int64_t d = 0; d < kDepth; ++d) accumulate(d);
  } else {
    for (int64_t d = 0; d < depth; ++d) accumulate(d);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) finish(r, column, acc[r]);
}

template <class V, int kCount>
constexpr int count_of(V (&)[kCount]) {
  return kCount;
}

// rows (kRows, depth) · panels (depth, columns) over columns [begin, end).
template <int kDepth, class T, class Init, class Finish>
SWIN_ALWAYS_INLINE void product_rows(const T* rows, int64_t row_stride, const T* panels, int64_t depth, int64_t begin,
                                     int64_t end, const Init& init, const Finish& finish) {
  constexpr int kWide = kColumnVectors<T>;
  int64_t column = begin;
  for (; column < end && column % (kWide * kLanes<T>) != 0; column += kLanes<T>)
    product_block<kDepth, 1>(rows, row_stride, panels, depth, column, init, finish);
  for (; column + kWide * kLanes<T> <= end; column += kWide * kLanes<T>)
    product_block<kDepth, kWide>(rows, row_stride, panels, depth, column, init, finish);
  for (; column < end; column += kLanes<T>)
    product_block<kDepth, 1>(rows, row_stride, panels, depth, column, init, finish);
}

// kPanel rows of `depth` to one panel (depth, kPanel), in blocks of four by four.
template <class T>
SWIN_ALWAYS_INLINE void transpose_to_panel(const T* const* rows, int64_t depth, T* panel) {
  typedef T Four __attribute__((vector_size(4 * sizeof(T))));
  int64_t d = 0;
  for (; d + 4 <= depth; d += 4) {
    for (int i = 0; i < kPanel; i += 4) {
      Four a, b, c, e;
      std::memcpy(&a, rows[i] + d, sizeof a);
      std::memcpy(&b, rows[i + 1] + d, sizeof b);
      std::memcpy(&c, rows[i + 2] + d, sizeof c);
      std::memcpy(&e, rows[i + 3] + d, sizeof e);
      const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
      const Four ce_low = __builtin_shufflevector(c, e, 0, 4, 1, 5),
                 ce_high = __builtin_shufflevector(c, e, 2, 6, 3, 7);
      const Four column[4] = {
          __builtin_shufflevector(ab_low, ce_low, 0, 1, 4, 5), __builtin_shufflevector(ab_low, ce_low, 2, 3, 6, 7),
          __builtin_shufflevector(ab_high, ce_high, 0, 1, 4, 5), __builtin_shufflevector(ab_high, ce_high, 2, 3, 6, 7)};
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) std::memcpy(panel + (d + j) * kPanel + i, &column[j], sizeof(Four));
    }
  }
  for (; d < depth; ++d)
    for (int i = 0; i < kPanel; ++i) panel[d * kPanel + i] = rows[i][d];
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
  constexpr int kCount = 4;
  const Vec<T> o = broadcast(offset);
  Vec<T> sums[2] = {};
  int64_t k = begin;
  for (; k + kCount * kLanes<T> <= end; k += kCount * kLanes<T>) {
    Vec<T> x[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) x[i] = load(row + k + i * kLanes<T>) - o;
    powers_of_two<T>(x);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      store(row + k + i * kLanes<T>, x[i]);
      sums[i % 2] += x[i];
    }
  }
  for (; k < end; k += kLanes<T>) {
    Vec<T> x[1] = {load(row + k) - o};
    powers_of_two<T>(x);
    store(row + k, x[0]);
    sums[0] += x[0];
  }
  return sum_lanes<T>(sums[0] + sums[1]);
}

}  // namespace SWIN_ISA
}  // namespace swin
