// Window partition and reverse on the CPU as torch operators.
#include "cpu/window_partition/kernels.h"
#include "torch/cpu/cpu.h"

namespace swin_torch {
namespace {

Tensor window_partition(Tensor x, Ints window, Ints shift) {
  const char* op = "window_partition";
  require(x.dim() == 4 || x.dim() == 5, op, "x has shape ", text(shape(x)),
          "; accepted is (B, H, W, C) or (B, D, H, W, C)");
  require_dense(op, "x", x);
  const Ints sizes = shape(x);
  const swin::WindowGrid grid = grid_of(op, Ints(sizes.begin() + 1, sizes.end() - 1), window, window, shift);
  const int64_t windows = sizes.front() * swin::product(grid.counts);
  Tensor result = torch::stable::empty(Ints{windows, swin::product(grid.window), sizes.back()}, x.scalar_type());
  const int64_t token_bytes = sizes.back() * static_cast<int64_t>(x.element_size());
  const swin::PartitionCall call{&grid, token_bytes, x.const_data_ptr(), result.mutable_data_ptr()};
  torch::stable::parallel_for(0, windows, 1, [&](int64_t b, int64_t e) { swin::partition_windows(call, b, e); });
  return result;
}

Tensor window_reverse(Tensor windows, Ints window, Ints shift, Ints spatial) {
  const char* op = "window_reverse";
  require_dense(op, "windows", windows);
  const swin::WindowGrid grid = grid_of(op, spatial, window, window, shift);
  const int64_t per_volume = swin::product(grid.counts);
  require(windows.dim() == 3 && windows.size(0) % per_volume == 0 && windows.size(1) == swin::product(grid.window), op,
          "windows has shape ", text(shape(windows)), "; accepted is (a multiple of ", per_volume, ", ",
          swin::product(grid.window), ", C)");
  Ints sizes{windows.size(0) / per_volume};
  sizes.insert(sizes.end(), spatial.begin(), spatial.end());
  sizes.push_back(windows.size(2));
  Tensor result = torch::stable::empty(sizes, windows.scalar_type());
  const int64_t token_bytes = windows.size(2) * static_cast<int64_t>(windows.element_size());
  const swin::PartitionCall call{&grid, token_bytes, windows.const_data_ptr(), result.mutable_data_ptr()};
  torch::stable::parallel_for(0, windows.size(0), 1, [&](int64_t b, int64_t e) { swin::reverse_windows(call, b, e); });
  return result;
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def("window_partition(Tensor x, int[] window, int[] shift) -> Tensor");
  m.def("window_reverse(Tensor windows, int[] window, int[] shift, int[] spatial) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("window_partition", TORCH_BOX(&swin_torch::window_partition));
  m.impl("window_reverse", TORCH_BOX(&swin_torch::window_reverse));
}
