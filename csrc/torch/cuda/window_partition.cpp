// Window partition and reverse on the GPU as torch operators.
#include "cuda/window_partition.h"

#include "torch/cuda/cuda.h"

namespace swin_torch {
namespace {

SwinPartition partition_of(const Tensor& t, int64_t batch, const swin::WindowGrid& grid) {
  SwinPartition call{};
  call.element_bytes = static_cast<int64_t>(t.element_size());
  call.batch = batch;
  call.channels = t.size(t.dim() - 1);
  call.grid = grid;
  return call;
}

Tensor window_partition(Tensor x, Ints window, Ints shift) {
  const char* op = "window_partition";
  const Ints sizes = shape(x);
  require(sizes.size() == 4 || sizes.size() == 5, op, "x has shape ", text(sizes),
          "; accepted is (B, H, W, C) or (B, D, H, W, C)");
  require_dense(op, "x", x, x.get_device_index());
  const swin::WindowGrid grid = grid_of(op, Ints(sizes.begin() + 1, sizes.end() - 1), window, window, shift);
  const DeviceGuard guard(x.get_device_index());
  const int64_t windows = sizes.front() * swin::product(grid.counts);
  Tensor result = torch::stable::new_empty(x, Ints{windows, swin::product(grid.window), sizes.back()});
  const SwinPartition call = partition_of(x, sizes.front(), grid);
  require_launched(op, swin_cuda_window_partition(&call, x.const_data_ptr(), result.mutable_data_ptr(),
                                                  current_stream(x.get_device_index())));
  return result;
}

Tensor window_reverse(Tensor windows, Ints window, Ints shift, Ints spatial) {
  const char* op = "window_reverse";
  require_dense(op, "windows", windows, windows.get_device_index());
  const swin::WindowGrid grid = grid_of(op, spatial, window, window, shift);
  const int64_t per_volume = swin::product(grid.counts);
  require(windows.dim() == 3 && windows.size(0) % per_volume == 0 && windows.size(1) == swin::product(grid.window), op,
          "windows has shape ", text(shape(windows)), "; accepted is (a multiple of ", per_volume, ", ",
          swin::product(grid.window), ", C)");
  const DeviceGuard guard(windows.get_device_index());
  Ints sizes{windows.size(0) / per_volume};
  sizes.insert(sizes.end(), spatial.begin(), spatial.end());
  sizes.push_back(windows.size(2));
  Tensor result = torch::stable::new_empty(windows, sizes);
  const SwinPartition call = partition_of(windows, sizes.front(), grid);
  require_launched(op, swin_cuda_window_reverse(&call, windows.const_data_ptr(), result.mutable_data_ptr(),
                                                current_stream(windows.get_device_index())));
  return result;
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cuda, m) {
  m.def("window_partition(Tensor x, int[] window, int[] shift) -> Tensor");
  m.def("window_reverse(Tensor windows, int[] window, int[] shift, int[] spatial) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CUDA, m) {
  m.impl("window_partition", TORCH_BOX(&swin_torch::window_partition));
  m.impl("window_reverse", TORCH_BOX(&swin_torch::window_reverse));
}
