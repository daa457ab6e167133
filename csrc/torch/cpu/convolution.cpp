// Convolution over a concatenation on the CPU as torch operators.
#include <algorithm>

#include "cpu/convolution/kernels.h"
#include "torch/cpu/cpu.h"

namespace swin_torch {
namespace {

void require_volume(const char* op, const char* name, const Tensor& t) {
  require_dense(op, name, t);
  require(t.scalar_type() == ScalarType::Float, op, name, " is not float32");
  require(t.dim() == 5 && t.numel() > 0, op, name, " has shape ", text(shape(t)), "; accepted is (B, D, H, W, C)");
}

// Runs work(scratch, next) on as many threads as there are items of work: each has its own `floats` of scratch, all
// share the counter of items.
template <class Work>
void share(int64_t items, int64_t floats, const Work& work) {
  const int64_t workers = std::clamp<int64_t>(items, 1, torch::stable::get_num_threads());
  floats = (floats + 15) / 16 * 16;
  Tensor scratch = empty_on_large_pages(Ints{workers, floats}, ScalarType::Float);
  share_items(workers, scratch.mutable_data_ptr(), static_cast<size_t>(floats) * sizeof(float),
              [&](void* own, swin::WorkCounter& next) { work(static_cast<float*>(own), next); });
}

// A block of output rows is as high as it can be with its inputs still in a core's cache.
int64_t block_height(const swin::ConvolutionCall& call) {
  constexpr int64_t kVoxels = 64, kBytes = int64_t{1} << 19, kLeast = 4, kMost = 16;
  if (call.kernel == 1) return kVoxels;
  const int64_t row_bytes = 18 * ((call.extent[2] + 3) / 4) * in_channels(call) * static_cast<int64_t>(sizeof(float));
  return std::min(std::clamp(kBytes / row_bytes - 2, kLeast, kMost), call.extent[1]);
}

// The gradient of a source has the weight's input channels from `first` on as outputs; a convolution has all of them
// as inputs.
Tensor convolve(const char* op, const Tensor& first_source, const OptionalTensor& second_source, const Tensor& weight,
                bool gradient, int64_t first, int64_t count) {
  require_volume(op, "x", first_source);
  if (second_source) require_volume(op, "skip", *second_source);
  require_dense(op, "weight", weight);
  require(weight.scalar_type() == ScalarType::Float, op, "weight is not float32");
  const int64_t kernel = weight.dim() == 5 ? weight.size(2) : 0;
  require((kernel == 1 || kernel == 3) && weight.size(3) == kernel && weight.size(4) == kernel, op, "weight has shape ",
          text(shape(weight)), "; accepted is (C_out, C_in, k, k, k) with k 1 or 3");
  const Ints sizes = shape(first_source);
  if (second_source) {
    Ints other = shape(*second_source);
    other.back() = sizes.back();
    require(other == sizes, op, "skip has shape ", text(shape(*second_source)), "; it must be that of x, ", text(sizes),
            ", but for the channels");
  }
  swin::ConvolutionCall call{};
  const int64_t taps = kernel * kernel * kernel, weight_in = weight.size(1);
  call.kernel = kernel;
  call.batch = sizes[0];
  for (int axis = 0; axis < swin::kAxes; ++axis) call.extent[axis] = sizes[static_cast<size_t>(axis) + 1];
  call.channels[0] = sizes[4];
  call.channels[1] = second_source ? second_source->size(4) : 0;
  require(in_channels(call) == (gradient ? weight.size(0) : weight_in), op, "x and skip have ", in_channels(call),
          " channels together; weight has shape ", text(shape(weight)));
  require(!gradient || (first >= 0 && count >= 1 && first < weight_in && count <= weight_in - first), op,
          "channels out of range");
  call.source[0] = static_cast<const float*>(first_source.const_data_ptr());
  call.source[1] = second_source ? static_cast<const float*>(second_source->const_data_ptr()) : nullptr;
  call.weight = static_cast<const float*>(weight.const_data_ptr()) + (gradient ? first * taps : 0);
  call.weight_out_stride = gradient ? taps : weight_in * taps;
  call.weight_in_stride = gradient ? weight_in * taps : taps;
  call.flip = gradient;
  call.out_channels = gradient ? count : weight.size(0);
  call.block_height = block_height(call);
  // In long runs few planes are transformed twice; enough runs keep many threads busy.
  constexpr int64_t kRuns = 64, kMostPlanes = 8;
  const int64_t across = (call.extent[1] + call.block_height - 1) / call.block_height;
  call.block_planes = std::clamp<int64_t>(call.batch * call.extent[0] * across / kRuns, 1, kMostPlanes);
  const swin::Build build = build_here();
  Ints out_sizes = sizes;
  out_sizes.back() = call.out_channels;
  Tensor out = empty_on_large_pages(out_sizes, ScalarType::Float);
  call.out = static_cast<float*>(out.mutable_data_ptr());
  Tensor packed = torch::stable::empty(Ints{swin::packed_weights[build](call)}, ScalarType::Float);
  call.packed = static_cast<float*>(packed.mutable_data_ptr());
  run_workers(swin::pack_items[build](call), [&](int64_t i) { swin::pack_weights[build](call, i); });
  share(swin::convolution_blocks[build](call), swin::convolution_scratch[build](call),
        [&](float* scratch, swin::WorkCounter& next) { swin::convolve[build](call, scratch, next); });
  return out;
}

Tensor convolution_forward(Tensor x, OptionalTensor skip, Tensor weight) {
  return convolve("convolution", x, skip, weight, false, 0, 0);
}

Tensor convolution_backward_input(Tensor grad_out, Tensor weight, int64_t first, int64_t count) {
  return convolve("convolution_backward", grad_out, std::nullopt, weight, true, first, count);
}

// The gradient of a 3×3×3 convolution's weight for the channels of x.
Tensor convolution_backward_weight(Tensor grad_out, Tensor x) {
  const char* op = "convolution_backward";
  require_volume(op, "grad_out", grad_out);
  require_volume(op, "x", x);
  const Ints sizes = shape(x);
  Ints like_x = shape(grad_out);
  like_x.back() = sizes.back();
  require(like_x == sizes, op, "grad_out has shape ", text(shape(grad_out)), "; it must be that of x, ", text(sizes),
          ", but for the channels");
  swin::WeightGradientCall call{};
  call.batch = sizes[0];
  for (int axis = 0; axis < swin::kAxes; ++axis) call.extent[axis] = sizes[static_cast<size_t>(axis) + 1];
  call.in_channels = sizes[4];
  call.out_channels = grad_out.size(4);
  call.source = static_cast<const float*>(x.const_data_ptr());
  call.grad_out = static_cast<const float*>(grad_out.const_data_ptr());
  // Long sums in registers, and inputs and gradients of one frequency in the first-level cache.
  constexpr int64_t kTiles = 96;
  const int64_t tiles = (call.extent[2] + 3) / 4;
  call.block_height = std::min((kTiles + tiles - 1) / tiles, call.extent[1]);
  // Separate slabs, so that threads need not wait for one another; only as many as fit in little memory.
  constexpr int64_t kSlabs = 24, kBytes = int64_t{1} << 24;
  const swin::Build build = build_here();
  const int64_t sums = swin::weight_gradient_sums[build](call);
  call.slabs = std::clamp<int64_t>(kBytes / (sums * static_cast<int64_t>(sizeof(float))), 1,
                                   std::min(kSlabs, call.batch * call.extent[0]));
  Tensor memory = empty_on_large_pages(Ints{call.slabs, sums}, ScalarType::Float);
  call.sums = static_cast<float*>(memory.mutable_data_ptr());
  Tensor grad_weight = torch::stable::empty(Ints{call.out_channels, call.in_channels, 3, 3, 3}, ScalarType::Float);
  call.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  share(swin::weight_gradient_items[build](call), swin::weight_gradient_scratch[build](call),
        [&](float* scratch, swin::WorkCounter& next) { swin::add_weight_gradient[build](call, scratch, next); });
  run_workers(call.in_channels, [&](int64_t i) { swin::finish_weight_gradient[build](call, i); });
  return grad_weight;
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def("convolution_forward(Tensor x, Tensor? skip, Tensor weight) -> Tensor");
  m.def("convolution_backward_input(Tensor grad_out, Tensor weight, int first, int count) -> Tensor");
  m.def("convolution_backward_weight(Tensor grad_out, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("convolution_forward", TORCH_BOX(&swin_torch::convolution_forward));
  m.impl("convolution_backward_input", TORCH_BOX(&swin_torch::convolution_backward_input));
  m.impl("convolution_backward_weight", TORCH_BOX(&swin_torch::convolution_backward_weight));
}
