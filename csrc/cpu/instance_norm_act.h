// Instance norm, residual and LeakyReLU on rows of channels: y = leaky_relu(norm(x) + residual or norm(residual)).
// Compiled once per vector width, as everything in SWIN_ISA's namespace.
//
// Voxels are cut into blocks whose size depends on the shape alone. Statistics are taken in two passes over each block,
// which stays in cache (mean, then squares around it), and blocks are joined in their order in double precision: sound
// for means far larger than the deviations, and the same for any number of threads.
#pragma once

#include <cmath>

#include "decoder.h"
#include "storage.h"

namespace swin {
namespace SWIN_ISA {

// Rows of stored elements in arithmetic precision, where they lie if they are stored in it.
template <class T>
class RowReader {
 public:
  RowReader(const void* from, ElementType type, int64_t channels, T* scratch)
      : from_(from), type_(type), channels_(channels), scratch_(scratch) {}

  const T* rows(int64_t first, int64_t count) const {
    const void* stored = at(from_, type_, first * channels_);
    if (element_bytes(type_) == sizeof(T)) return static_cast<const T*>(stored);
    load_row(stored, type_, count * channels_, scratch_);
    return scratch_;
  }

 private:
  const void* from_;
  ElementType type_;
  int64_t channels_;
  T* scratch_;
};

// The same for rows to be written: fill what rows() returns, then call store() with the same arguments.
template <class T>
class RowWriter {
 public:
  RowWriter(void* to, ElementType type, int64_t channels, T* scratch)
      : to_(to), type_(type), channels_(channels), scratch_(scratch) {}

  T* rows(int64_t first) const {
    return element_bytes(type_) == sizeof(T) ? static_cast<T*>(at(to_, type_, first * channels_)) : scratch_;
  }
  void store(int64_t first, int64_t count) const {
    if (element_bytes(type_) != sizeof(T))
      store_row(scratch_, T(1), type_, count * channels_, at(to_, type_, first * channels_));
  }

 private:
  void* to_;
  ElementType type_;
  int64_t channels_;
  T* scratch_;
};

// A block of voxels of one instance, as rows of the whole batch.
struct VoxelBlock {
  int64_t instance, first, count;
};

SWIN_ALWAYS_INLINE VoxelBlock voxel_block(const NormCall& call, int64_t index) {
  const int64_t instance = index / call.blocks, begin = index % call.blocks * call.block_voxels;
  const int64_t left = call.voxels - begin;
  return {instance, instance * call.voxels + begin, left < call.block_voxels ? left : call.block_voxels};
}

template <class T>
SWIN_ALWAYS_INLINE void zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

template <class T>
SWIN_ALWAYS_INLINE void add(const T* from, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Calls visit(first row, rows) for pieces of a block that the scratch rows hold. Sums are taken over each piece and
// then over pieces: short sums lose few digits.
template <class Visit>
SWIN_ALWAYS_INLINE void for_each_piece(const VoxelBlock& block, const Visit& visit) {
  for (int64_t done = 0; done < block.count; done += kNormScratchRows) {
    const int64_t left = block.count - done;
    visit(block.first + done, left < kNormScratchRows ? left : kNormScratchRows);
  }
}

// The values that the means of an instance are offsets from, those of its first voxel: `count` channels from `c` on.
template <class T>
void load_origin(const NormCall& call, const void* from, int64_t instance, int64_t c, int64_t count, T* origin) {
  load_row(at(from, call.type, instance * call.voxels * call.channels + c), call.type, count, origin);
}

// Mean as an offset from the origin, and sum of squares around it, for each channel of a block: 2 · C numbers to
// `partial`. Offsets are small however large the mean is, so that float32 holds what blocks differ by.
template <class T>
void block_statistics(const NormCall& call, const void* from, const VoxelBlock& block, T* scratch, T* partial) {
  const int64_t channels = call.channels;
  const RowReader<T> reader(from, call.type, channels, scratch);
  T *mean = partial, *squares = partial + channels;
  T *origin = scratch + kNormScratchRows * channels, *sums = origin + channels;
  load_origin(call, from, block.instance, 0, channels, origin);
  zero(partial, 2 * channels);
  for_each_piece(block, [&](int64_t first, int64_t count) {
    const T* x = reader.rows(first, count);
    zero(sums, channels);
    for (int64_t row = 0; row < count; ++row, x += channels) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) sums[c] += x[c] - origin[c];
    }
    add(sums, channels, mean);
  });
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<T>(block.count);
  for_each_piece(block, [&](int64_t first, int64_t count) {
    const T* x = reader.rows(first, count);
    zero(sums, channels);
    for (int64_t row = 0; row < count; ++row, x += channels) {
#pragma GCC ivdep
      for (int64_t c = 0; c < channels; ++c) {
        const T away = x[c] - origin[c] - mean[c];
        sums[c] += away * away;
      }
    }
    add(sums, channels, squares);
  });
}

template <class T>
void norm_partials(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const VoxelBlock block = voxel_block(call, i);
    T* partial = static_cast<T*>(call.partials) + i * statistics_rows(call) * call.channels;
    block_statistics(call, call.x, block, static_cast<T*>(scratch), partial);
    if (call.normalize_residual)
      block_statistics(call, call.residual, block, static_cast<T*>(scratch), partial + 2 * call.channels);
  }
}

constexpr int64_t kJoinedChannels = 32;

// Joins the blocks of one instance, in their order, to mean and 1 / sqrt(variance + eps), for `count` channels from `c`
// on of the pair of rows `pair`. (Chan, Golub, LeVeque 1979.)
template <class T>
void join_blocks(const NormCall& call, int64_t instance, int64_t pair, int64_t c, int64_t count) {
  const int64_t channels = call.channels, row = statistics_rows(call) * channels;
  const T* partial = static_cast<const T*>(call.partials) + instance * call.blocks * row + pair * channels + c;
  double mean[kJoinedChannels] = {}, squares[kJoinedChannels] = {}, voxels = 0;
  for (int64_t i = 0; i < call.blocks; ++i, partial += row) {
    const double added = static_cast<double>(voxel_block(call, i).count), total = voxels + added;
    const double share = added / total, weight = voxels * share;
    for (int64_t j = 0; j < count; ++j) {
      const double away = static_cast<double>(partial[j]) - mean[j];
      mean[j] += away * share;
      squares[j] += static_cast<double>(partial[channels + j]) + away * away * weight;
    }
    voxels = total;
  }
  T* statistics = static_cast<T*>(call.statistics) + instance * row + pair * channels + c;
  load_origin(call, pair == 0 ? call.x : call.residual, instance, c, count, statistics);
  for (int64_t j = 0; j < count; ++j) {
    statistics[j] = static_cast<T>(static_cast<double>(statistics[j]) + mean[j]);
    statistics[channels + j] = static_cast<T>(1 / std::sqrt(squares[j] / voxels + call.eps));
  }
}

template <class T>
void norm_statistics(const NormCall& call) {
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t pair = 0; pair < statistics_rows(call); pair += 2)
      for (int64_t c = 0; c < call.channels; c += kJoinedChannels)
        join_blocks<T>(call, b, pair, c, c + kJoinedChannels < call.channels ? kJoinedChannels : call.channels - c);
}

template <class T, bool kResidual, bool kNormalizeResidual>
void norm_apply(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t channels = call.channels;
  const T slope = static_cast<T>(call.negative_slope);
  T* pieces = static_cast<T*>(scratch);
  const RowReader<T> x_rows(call.x, call.type, channels, pieces);
  const RowReader<T> residual_rows(call.residual, call.type, channels, pieces + kNormScratchRows * channels);
  const RowWriter<T> y_rows(call.y, call.type, channels, pieces);
  for (int64_t i = begin; i < end; ++i) {
    const VoxelBlock block = voxel_block(call, i);
    const T* mean = static_cast<const T*>(call.statistics) + block.instance * statistics_rows(call) * channels;
    const T *scale = mean + channels, *residual_mean = mean + 2 * channels, *residual_scale = mean + 3 * channels;
    for_each_piece(block, [&](int64_t first, int64_t count) {
      const T* x = x_rows.rows(first, count);
      const T* r = kResidual ? residual_rows.rows(first, count) : nullptr;
      T* y = y_rows.rows(first);
      for (int64_t row = 0; row < count; ++row, x += channels, y += channels) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          T value = (x[c] - mean[c]) * scale[c];
          if constexpr (kNormalizeResidual)
            value += (r[c] - residual_mean[c]) * residual_scale[c];
          else if constexpr (kResidual)
            value += r[c];
          y[c] = value > 0 ? value : value * slope;
        }
        if (kResidual) r += channels;
      }
      y_rows.store(first, count);
    });
  }
}

// What the derivative needs of one element, from x, or from y where LeakyReLU and no residual stand between.
template <class T>
struct NormElement {
  T grad;        // of the sum before LeakyReLU
  T normalized;  // norm(x)
};

template <class T, bool kFromOutput>
SWIN_ALWAYS_INLINE NormElement<T> norm_element(T grad_y, T y, T x, T mean, T scale, T slope, T inverse_slope) {
  const T grad = y > 0 ? grad_y : grad_y * slope;
  if constexpr (kFromOutput) return {grad, y > 0 ? y : y * inverse_slope};
  return {grad, (x - mean) * scale};
}

// Readers of what a backward reads, over one scratch: kNormScratchRows rows for each tensor.
template <class T>
struct NormBackwardRows {
  RowReader<T> grad, y, x, residual;
  NormBackwardRows(const NormBackwardCall& call, T* scratch)
      : grad(call.grad_y, call.type, call.channels, scratch),
        y(call.output, call.type, call.channels, scratch + kNormScratchRows * call.channels),
        x(call.x, call.type, call.channels, scratch + 2 * kNormScratchRows * call.channels),
        residual(call.residual, call.type, call.channels, scratch + 3 * kNormScratchRows * call.channels) {}
};

// Sums of a block: grad, grad · norm(x), and grad · norm(residual) where that is normalized.
template <class T, bool kFromOutput, bool kNormalizeResidual>
void norm_backward_partials(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t channels = call.channels;
  const T slope = static_cast<T>(call.negative_slope), inverse_slope = 1 / slope;
  const NormBackwardRows<T> rows(call, static_cast<T*>(scratch));
  for (int64_t i = begin; i < end; ++i) {
    const VoxelBlock block = voxel_block(call, i);
    const T* mean = static_cast<const T*>(call.statistics) + block.instance * statistics_rows(call) * channels;
    const T *scale = mean + channels, *residual_mean = mean + 2 * channels, *residual_scale = mean + 3 * channels;
    T* partial = static_cast<T*>(call.partials) + i * gradient_rows(call) * channels;
    T* sums = static_cast<T*>(scratch) + 4 * kNormScratchRows * channels;
    T *products = sums + channels, *residual_products = products + channels;
    zero(partial, gradient_rows(call) * channels);
    for_each_piece(block, [&](int64_t first, int64_t count) {
      const T *grad = rows.grad.rows(first, count), *y = rows.y.rows(first, count);
      const T* x = kFromOutput ? y : rows.x.rows(first, count);
      const T* r = kNormalizeResidual ? rows.residual.rows(first, count) : y;
      zero(sums, gradient_rows(call) * channels);
      for (int64_t row = 0; row < count; ++row, grad += channels, y += channels, x += channels, r += channels) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const NormElement<T> e =
              norm_element<T, kFromOutput>(grad[c], y[c], x[c], mean[c], scale[c], slope, inverse_slope);
          sums[c] += e.grad;
          products[c] += e.grad * e.normalized;
          if constexpr (kNormalizeResidual)
            residual_products[c] += e.grad * ((r[c] - residual_mean[c]) * residual_scale[c]);
        }
      }
      add(sums, gradient_rows(call) * channels, partial);
    });
  }
}

// Means over each instance of what norm_backward_partials summed.
template <class T>
void norm_backward_means(const NormBackwardCall& call) {
  const int64_t row = gradient_rows(call) * call.channels;
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t c = 0; c < row; ++c) {
      const T* partial = static_cast<const T*>(call.partials) + b * call.blocks * row + c;
      double sum = 0;
      for (int64_t i = 0; i < call.blocks; ++i) sum += static_cast<double>(partial[i * row]);
      static_cast<T*>(call.means)[b * row + c] = static_cast<T>(sum / static_cast<double>(call.voxels));
    }
  }
}

template <class T, bool kFromOutput, bool kResidual, bool kNormalizeResidual>
void norm_backward_apply(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  const int64_t channels = call.channels;
  const T slope = static_cast<T>(call.negative_slope), inverse_slope = 1 / slope;
  T* pieces = static_cast<T*>(scratch);
  const NormBackwardRows<T> rows(call, pieces);
  const RowWriter<T> grad_x_rows(call.grad_x, call.type, channels, pieces + 4 * kNormScratchRows * channels);
  const RowWriter<T> grad_r_rows(call.grad_residual, call.type, channels, pieces + 5 * kNormScratchRows * channels);
  for (int64_t i = begin; i < end; ++i) {
    const VoxelBlock block = voxel_block(call, i);
    const T* mean = static_cast<const T*>(call.statistics) + block.instance * statistics_rows(call) * channels;
    const T *scale = mean + channels, *residual_mean = mean + 2 * channels, *residual_scale = mean + 3 * channels;
    const T* mean_grad = static_cast<const T*>(call.means) + block.instance * gradient_rows(call) * channels;
    const T *mean_product = mean_grad + channels, *mean_residual_product = mean_product + channels;
    for_each_piece(block, [&](int64_t first, int64_t count) {
      const T *grad = rows.grad.rows(first, count), *y = rows.y.rows(first, count);
      const T* x = kFromOutput ? y : rows.x.rows(first, count);
      const T* r = kNormalizeResidual ? rows.residual.rows(first, count) : y;
      T* grad_x = grad_x_rows.rows(first);
      T* grad_r = kResidual ? grad_r_rows.rows(first) : nullptr;
      for (int64_t row = 0; row < count; ++row, grad += channels, y += channels, x += channels, r += channels) {
#pragma GCC ivdep
        for (int64_t c = 0; c < channels; ++c) {
          const NormElement<T> e =
              norm_element<T, kFromOutput>(grad[c], y[c], x[c], mean[c], scale[c], slope, inverse_slope);
          grad_x[c] = scale[c] * (e.grad - mean_grad[c] - e.normalized * mean_product[c]);
          if constexpr (kNormalizeResidual) {
            const T normalized = (r[c] - residual_mean[c]) * residual_scale[c];
            grad_r[c] = residual_scale[c] * (e.grad - mean_grad[c] - normalized * mean_residual_product[c]);
          } else if constexpr (kResidual) {
            grad_r[c] = e.grad;
          }
        }
        grad_x += channels;
        if (kResidual) grad_r += channels;
      }
      grad_x_rows.store(first, count);
      if (kResidual) grad_r_rows.store(first, count);
    });
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
