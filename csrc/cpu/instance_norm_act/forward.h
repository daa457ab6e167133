// Instance norm, residual and LeakyReLU on rows of channels: y = leaky_relu(norm(x) + residual or norm(residual)).
//
// Voxels are cut into blocks whose size depends on the shape alone. Statistics are taken in two passes over each block,
// which stays in cache (mean, then squares around it), and blocks are combined in order in double precision: sound for
// means far larger than the deviations, and the same for any number of threads.
#pragma once

#include <cmath>

#include "cpu/instance_norm_act/rows.h"

namespace swin {
namespace SWIN_ISA {
namespace instance_norm_act {

// The values that an instance's means are measured from, those of its first voxel: `count` channels from `c` on.
template <class T>
void load_origin(const NormCall& call, const void* from, int64_t instance, int64_t c, int64_t count, T* origin) {
  load_row(at(from, call.type, instance * call.voxels * call.channels + c), call.type, count, origin);
}

// Mean as an offset from the origin, and sum of squares around it, for each channel of a block: 2 · C numbers to
// `partial`. Offsets are small however large the mean is, so that float32 can hold the differences between blocks.
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
void sum_statistics(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  for (int64_t i = begin; i < end; ++i) {
    const VoxelBlock block = voxel_block(call, i);
    T* partial = static_cast<T*>(call.partials) + i * statistics_rows(call) * call.channels;
    block_statistics(call, call.x, block, static_cast<T*>(scratch), partial);
    if (call.normalize_residual)
      block_statistics(call, call.residual, block, static_cast<T*>(scratch), partial + 2 * call.channels);
  }
}

constexpr int64_t kJoinedChannels = 32;

// Combines the blocks of one instance, in order, into mean and 1 / sqrt(variance + eps), for `count` channels from `c`
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
void join_statistics(const NormCall& call) {
  for (int64_t b = 0; b < call.batch; ++b)
    for (int64_t pair = 0; pair < statistics_rows(call); pair += 2)
      for (int64_t c = 0; c < call.channels; c += kJoinedChannels)
        join_blocks<T>(call, b, pair, c, c + kJoinedChannels < call.channels ? kJoinedChannels : call.channels - c);
}

template <class T, bool kResidual, bool kNormalizeResidual>
void apply_blocks(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
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

}  // namespace instance_norm_act
}  // namespace SWIN_ISA
}  // namespace swin
