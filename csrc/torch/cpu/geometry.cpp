// The arithmetic of windows and of dropout itself as torch operators, for the tests that compare it with
// swin_kernels/geometry.py.
#include "geometry.h"

#include "torch/cpu/attention.h"

namespace swin_torch {
namespace {

// For each window, the natural index of its tokens, -1 for padding, and their regions.
std::tuple<Tensor, Tensor> window_tokens(Ints spatial, Ints window, Ints shift) {
  const swin::WindowGrid grid = grid_of("window_tokens", spatial, window, window, shift);
  const int64_t windows = swin::product(grid.counts), tokens = swin::product(grid.window);
  Tensor index = torch::stable::empty(Ints{windows, tokens}, ScalarType::Long);
  Tensor label = torch::stable::empty(Ints{windows, tokens}, ScalarType::Long);
  int64_t* index_data = static_cast<int64_t*>(index.mutable_data_ptr());
  int64_t* label_data = static_cast<int64_t*>(label.mutable_data_ptr());
  for (int64_t w = 0; w < windows; ++w) {
    int64_t place[swin::kAxes];
    swin::decode(w, grid.counts, place);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t local[swin::kAxes];
      swin::decode(t, grid.window, local);
      int64_t token = 0, region = 0;
      bool real = true;
      for (int axis = 0; axis < swin::kAxes; ++axis) {
        const int64_t position = swin::natural_position(grid, axis, place[axis], local[axis]);
        real &= position >= 0;
        token = token * grid.spatial[axis] + position;
        region = region * 3 + swin::region_along(grid, axis, place[axis], local[axis]);
      }
      index_data[w * tokens + t] = real ? token : -1;
      label_data[w * tokens + t] = region;
    }
  }
  return {index, label};
}

Tensor bias_index(Ints nominal, int64_t tokens) {
  const char* op = "bias_index";
  const swin::WindowGrid grid = grid_of(op, nominal, nominal, nominal, Ints(nominal.size(), 0));
  require(tokens >= 0 && tokens <= swin::product(grid.nominal), op, "tokens is ", tokens, "; accepted is 0 to ",
          swin::product(grid.nominal));
  Tensor index = torch::stable::empty(Ints{tokens, tokens}, ScalarType::Long);
  int64_t* data = static_cast<int64_t*>(index.mutable_data_ptr());
  for (int64_t q = 0; q < tokens; ++q)
    for (int64_t k = 0; k < tokens; ++k)
      *data++ = swin::bias_raster(grid, q) - swin::bias_raster(grid, k) + swin::bias_origin(grid);
  return index;
}

Tensor dropout_keep(Tensor seed, Tensor rows, int64_t tokens, double dropout_p) {
  const char* op = "dropout_keep";
  require_shape(op, "seed", seed, {1});
  require_dense(op, "rows", rows);
  require(seed.scalar_type() == ScalarType::Long && rows.scalar_type() == ScalarType::Long, op,
          "seed and rows must be int64");
  require(tokens >= 0 && tokens <= kLargestWindow, op, "tokens is ", tokens, "; accepted is 0 to ", kLargestWindow);
  require(dropout_p >= 0 && dropout_p < 1, op, "dropout_p is ", dropout_p, "; accepted is 0 <= dropout_p < 1");
  Ints sizes = shape(rows);
  sizes.push_back(tokens);
  Tensor keep = torch::stable::empty(sizes, ScalarType::Bool);
  const int64_t* row = static_cast<const int64_t*>(rows.const_data_ptr());
  bool* data = static_cast<bool*>(keep.mutable_data_ptr());
  const uint32_t threshold = swin::dropout_threshold(dropout_p);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    const uint32_t hash = swin::dropout_row_hash(*static_cast<const int64_t*>(seed.const_data_ptr()), row[i]);
    for (int64_t k = 0; k < tokens; ++k) *data++ = swin::dropout_keep(hash, static_cast<uint32_t>(k), threshold);
  }
  return keep;
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def("dropout_keep(Tensor seed, Tensor rows, int tokens, float dropout_p) -> Tensor");
  m.def("window_tokens(int[] spatial, int[] window, int[] shift) -> (Tensor, Tensor)");
  m.def("bias_index(int[] nominal, int tokens) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) { m.impl("dropout_keep", TORCH_BOX(&swin_torch::dropout_keep)); }

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("window_tokens", TORCH_BOX(&swin_torch::window_tokens));
  m.impl("bias_index", TORCH_BOX(&swin_torch::bias_index));
}
