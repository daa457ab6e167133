// Convolution over a concatenation on the GPU as a torch operator.
#include "cuda/convolution.h"

#include "torch/cuda/cuda.h"

namespace swin_torch {
namespace {

// The weight as swin_cuda_convolution takes it.
Tensor convolution_forward(Tensor x, std::optional<Tensor> skip, Tensor weight) {
  const char* op = "convolution";
  const int32_t device = x.get_device_index();
  Ints sizes = shape(x);
  require(sizes.size() == 5, op, "x has shape ", text(sizes), "; accepted is (B, D, H, W, C)");
  require_dense(op, "x", x, device);
  require(weight.dim() == 5, op, "weight has shape ", text(shape(weight)), "; accepted is (out, in, 27, 48, 48)");
  SwinConvolution call{};
  call.element = element_of(op, "x", x);
  call.batch = sizes[0];
  for (int axis = 0; axis < swin::kAxes; ++axis) call.spatial[axis] = sizes[static_cast<size_t>(axis) + 1];
  call.channels = sizes.back();
  call.out_channels = 48 * weight.size(0);
  if (skip) {
    call.skip_channels = skip->size(skip->dim() - 1);
    Ints like = sizes;
    like.back() = call.skip_channels;
    require_like(op, "skip", *skip, like, x.scalar_type(), device);
  }
  const Ints packed{weight.size(0), (call.channels + call.skip_channels) / 48, 27, 48, 48};
  require_like(op, "weight", weight, packed, x.scalar_type(), device);
  const DeviceGuard guard(device);
  x = aligned(x), weight = aligned(weight);
  if (skip) skip = aligned(*skip);
  sizes.back() = call.out_channels;
  Tensor out = torch::stable::new_empty(x, sizes);
  require_launched(op, swin_cuda_convolution(&call, x.const_data_ptr(), skip ? skip->const_data_ptr() : nullptr,
                                             weight.const_data_ptr(), out.mutable_data_ptr(), current_stream(device)));
  return out;
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cuda, m) {
  m.def("convolution_forward(Tensor x, Tensor? skip, Tensor weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CUDA, m) {
  m.impl("convolution_forward", TORCH_BOX(&swin_torch::convolution_forward));
}
