// What the operators around window attention share: checks of a call, its plan of windows, items of work.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/window_attention/kernels.h"
#include "torch/cpu/cpu.h"

namespace swin_torch {

constexpr int64_t kLargestWindow = int64_t{1} << 12;  // tokens that window_attention takes: 16³
constexpr int64_t kMostWindows = INT32_MAX;           // of a volume, as WindowPlan counts them

// The arguments that forward and backward share, checked, and the memory their kernels work in.
struct Attention {
  swin::WindowPlan plan;
  Ints volume;  // (B, *S)
  int64_t channels;
  size_t accumulate_bytes;
  ScalarType accumulated;
  int64_t workers;
  Buffer bias_columns;

  Attention(const char* op, const Tensor& qkv, const Tensor& bias_table, const OptionalTensor& pad_qkv,
            const OptionalTensor& seed, const Ints& nominal, const Ints& window, const Ints& shift, double scale,
            double dropout_p, swin::AttentionCall& call, int64_t parts_to_project = 1)
      : plan(plan_of(op, qkv, nominal, window, shift)), volume(shape(qkv)), workers(torch::stable::get_num_threads()) {
    volume.pop_back();
    require_dense(op, "qkv", qkv);
    const int64_t table_length = swin::bias_table_length(plan.grid);
    require(bias_table.dim() == 2 && bias_table.size(0) == table_length && bias_table.size(1) >= 1, op,
            "bias_table has shape ", text(shape(bias_table)), "; accepted is (", table_length, ", heads)");
    require_dense(op, "bias_table", bias_table);
    call.heads = bias_table.size(1);
    const int64_t qkv_channels = qkv.size(qkv.dim() - 1) * parts_to_project;
    require(qkv_channels > 0 && qkv_channels % (3 * call.heads) == 0, op, "qkv has ", qkv_channels, " channels; with ",
            call.heads, " heads it must be a multiple of ", 3 * call.heads);
    call.type = element_type(op, "qkv", qkv);
    call.bias_type = element_type(op, "bias_table", bias_table);
    require(call.bias_type == call.type || call.bias_type == swin::ElementType::kFloat32, op,
            "bias_table must have the dtype of qkv or float32");
    require(call.type == swin::ElementType::kFloat64 || call.bias_type != swin::ElementType::kFloat64, op,
            "bias_table must have the dtype of qkv or float32");
    if (pad_qkv) {
      require_shape(op, "pad_qkv", *pad_qkv, {qkv_channels});
      require(pad_qkv->scalar_type() == qkv.scalar_type(), op, "pad_qkv must have the dtype of qkv");
    }
    require(dropout_p >= 0 && dropout_p < 1, op, "dropout_p is ", dropout_p, "; accepted is 0 <= dropout_p < 1");
    require(dropout_p == 0 || seed, op, "seed is missing; dropout needs one");
    if (seed) {
      require_shape(op, "seed", *seed, {1});
      require(seed->scalar_type() == ScalarType::Long, op, "seed must be int64");
    }
    channels = qkv_channels / 3;
    call.plan = &plan;
    call.patterns = plan.patterns.data();
    call.pattern_count = static_cast<int64_t>(plan.patterns.size());
    call.windows = plan.windows.data();
    call.batch = volume[0];
    call.head_dim = channels / call.heads;
    call.scale = scale;
    call.qkv = qkv.const_data_ptr();
    call.bias_table = bias_table.const_data_ptr();
    call.pad_qkv = pad_qkv ? pad_qkv->const_data_ptr() : nullptr;
    call.dropout_p = dropout_p;
    call.seed = seed ? *static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
    accumulated = accumulate_type(call.type);
    accumulate_bytes = call.type == swin::ElementType::kFloat64 ? 8 : 4;
    call.bias_stride = swin::bias_stride(plan.grid);
    bias_columns = allocate(accumulate_bytes * static_cast<size_t>(call.heads * call.bias_stride));
    call.bias_columns = bias_columns.get();
  }

  // Windows are planned only where this backend supports them (backends/cpu/__init__.py).
  static swin::WindowPlan plan_of(const char* op, const Tensor& qkv, const Ints& nominal, const Ints& window,
                                  const Ints& shift) {
    require(qkv.dim() == 4 || qkv.dim() == 5, op, "qkv has shape ", text(shape(qkv)),
            "; accepted is (B, H, W, 3C) or (B, D, H, W, 3C)");
    const Ints sizes = shape(qkv), spatial(sizes.begin() + 1, sizes.end() - 1);
    const swin::WindowGrid grid = grid_of(op, spatial, nominal, window, shift);
    const bool any = sizes.front() > 0;
    require(swin::product(grid.window) <= kLargestWindow, op, "window_size ", text(window), " holds more than ",
            kLargestWindow, " tokens");
    require(!any || swin::product(grid.counts) <= kMostWindows, op, "window_size ", text(window), " cuts a volume of ",
            text(spatial), " into more than ", kMostWindows, " windows");
    return swin::WindowPlan(grid, any);
  }

  Ints with_channels(int64_t c) const {
    Ints sizes = volume;
    sizes.push_back(c);
    return sizes;
  }

  void prepare_bias(swin::Build build, const swin::AttentionCall& call) const {
    share_items(workers, [&](swin::WorkCounter& next) { swin::prepare_bias[build](call, next); });
  }

  // Runs work(scratch, next) on every thread: each has its own `bytes` of scratch, all share the counter of work items.
  template <class Work>
  void share(size_t bytes, const Work& work) const {
    bytes = (bytes + 63) / 64 * 64;
    const Buffer scratch = allocate(bytes * static_cast<size_t>(workers));
    share_items(workers, scratch.get(), bytes, work);
  }
};

inline Tensor zeros(const Ints& sizes, const Tensor& like) {
  Tensor tensor = torch::stable::empty(sizes, like.scalar_type());
  return torch::stable::zero_(tensor);
}

// Work items of at most `size` windows. The windows of the first pattern, in most volumes the most numerous and the
// most expensive, come first.
inline std::vector<swin::WindowChunk> window_chunks(const swin::AttentionCall& call, int64_t size) {
  std::vector<swin::WindowChunk> chunks;
  for (int64_t p = 0; p < call.pattern_count; ++p) {
    const int64_t windows = (call.patterns[p].window_end - call.patterns[p].window_begin) * call.batch;
    for (int64_t begin = 0; begin < windows; begin += size)
      for (int64_t head = 0; head < call.heads; ++head)
        chunks.push_back({p, head, begin, std::min(begin + size, windows)});
  }
  return chunks;
}

// Windows in a forward's item of work.
constexpr int64_t kForwardChunk = 4;

}  // namespace swin_torch
