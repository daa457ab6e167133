// Gradients of instance_norm_act: sums of each block, their means over an instance, and from these the gradients.
#pragma once

#include "cpu/instance_norm_act/rows.h"

namespace swin {
namespace SWIN_ISA {
namespace instance_norm_act {

// What the derivative needs for one element, from x, or from y where only LeakyReLU lies between, no residual.
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

// Readers of a backward's inputs, over one scratch: kNormScratchRows rows for each tensor.
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
void sum_gradients(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
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

// Means over each instance of what sum_gradients summed.
template <class T>
void average_gradients(const NormBackwardCall& call) {
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
void differentiate_blocks(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
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

}  // namespace instance_norm_act
}  // namespace SWIN_ISA
}  // namespace swin
