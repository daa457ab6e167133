// The decoder's CPU kernels as operators of torch, through the stable ABI: checks, allocation, threads.
#include "../cpu/decoder.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "memory.h"

namespace {

using swin::ConvolutionCall;
using swin::DecoderKernels;
using swin::ElementType;
using swin::NormBackwardCall;
using swin::NormCall;
using swin::WeightGradientCall;
using swin_torch::empty_on_large_pages;
using swin_torch::Ints;
using swin_torch::require;
using swin_torch::shape;
using swin_torch::text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const DecoderKernels& kernels() {
  const char* error = nullptr;
  const DecoderKernels* table = swin::select_decoder_kernels(&error);
  if (table == nullptr) {
    const char* wanted = std::getenv("SWIN_KERNELS_ISA");
    throw std::runtime_error("SWIN_KERNELS_ISA=" + std::string(wanted ? wanted : "") + " " + error);
  }
  return *table;
}

// Arithmetic precision of stored elements.
ScalarType accumulate_type(ElementType type) {
  return type == ElementType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

ElementType element_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::Double: return ElementType::kFloat64;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: require(false, op, name, " has a dtype that is not float32, float64, bfloat16 or float16");
  }
  return ElementType::kFloat32;
}

void require_dense(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu(), op, name, " is not on the CPU");
  require(t.is_contiguous(), op, name, " is not contiguous");
}

void require_like(const char* op, const char* name, const Tensor& t, const Tensor& like, const char* like_name) {
  require_dense(op, name, t);
  require(shape(t) == shape(like), op, name, " has shape ", text(shape(t)), "; accepted is that of ", like_name, ", ",
          text(shape(like)));
  require(t.scalar_type() == like.scalar_type(), op, name, " must have the dtype of ", like_name);
}

// A block of voxels is small enough to stay in a core's cache between the two passes over it, and has few enough for
// plain sums. It is fixed, so that sums have one order for any number of threads.
constexpr int64_t kBlockElements = 16384, kBlockVoxels = 256;

// What both directions share; `like` is a volume (B, *S, C).
void describe(const char* op, const Tensor& like, bool normalize_residual, double negative_slope, NormCall* call) {
  require_dense(op, "x", like);
  require(like.dim() >= 3, op, "x has shape ", text(shape(like)), "; accepted is (B, *S, C)");
  const Ints sizes = shape(like);
  call->batch = sizes.front();
  call->channels = sizes.back();
  call->voxels = 1;
  for (size_t i = 1; i + 1 < sizes.size(); ++i) call->voxels *= sizes[i];
  require(call->voxels >= 1 && call->channels >= 1, op, "x has shape ", text(sizes), "; only the batch may be empty");
  call->block_voxels = std::clamp<int64_t>(kBlockElements / call->channels, 1, kBlockVoxels);
  call->blocks = (call->voxels + call->block_voxels - 1) / call->block_voxels;
  call->type = element_type(op, "x", like);
  call->normalize_residual = normalize_residual;
  call->negative_slope = negative_slope;
}

// Runs work(begin, end, scratch) over all blocks, an equal share of them on each thread.
template <class Work>
void over_blocks(const NormCall& call, const Tensor& scratch, const Work& work) {
  const int64_t total = call.batch * call.blocks, shares = scratch.size(0);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t bytes = scratch.size(1) * static_cast<int64_t>(scratch.element_size());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(total * i / shares, total * (i + 1) / shares, memory + i * bytes);
  });
}

Tensor scratch_for(const NormCall& call) {
  const int64_t shares = std::clamp<int64_t>(call.batch * call.blocks, 1, torch::stable::get_num_threads());
  return torch::stable::empty(Ints{shares, swin::kNormScratchTensors * swin::kNormScratchRows * call.channels},
                              accumulate_type(call.type));
}

Tensor partials_for(const NormCall& call, int64_t rows) {
  return torch::stable::empty(Ints{call.batch * call.blocks, rows, call.channels}, accumulate_type(call.type));
}

// y and the statistics of a call into `y`, which may be x itself.
Tensor normalize(const Tensor& x, const std::optional<Tensor>& residual, bool normalize_residual, double eps,
                 double negative_slope, const Tensor& y) {
  const char* op = "instance_norm_act";
  NormCall call{};
  describe(op, x, normalize_residual, negative_slope, &call);
  if (residual) require_like(op, "residual", *residual, x, "x");
  require(residual || !normalize_residual, op, "residual is missing; normalize_residual needs one");
  Tensor statistics =
      torch::stable::empty(Ints{call.batch, statistics_rows(call), call.channels}, accumulate_type(call.type));
  if (call.batch == 0) return statistics;
  Tensor partials = partials_for(call, statistics_rows(call));
  const Tensor scratch = scratch_for(call);
  call.eps = eps;
  call.x = x.const_data_ptr();
  call.residual = residual ? residual->const_data_ptr() : nullptr;
  call.y = y.mutable_data_ptr();
  call.statistics = statistics.mutable_data_ptr();
  call.partials = partials.mutable_data_ptr();
  const DecoderKernels& table = kernels();
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { table.norm_partials(call, b, e, s); });
  table.norm_statistics(call);
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { table.norm_apply(call, b, e, s); });
  return statistics;
}

std::tuple<Tensor, Tensor> instance_norm_act_forward(Tensor x, std::optional<Tensor> residual, bool normalize_residual,
                                                     double eps, double negative_slope) {
  Tensor y = empty_on_large_pages(shape(x), x.scalar_type());
  Tensor statistics = normalize(x, residual, normalize_residual, eps, negative_slope, y);
  return {y, statistics};
}

void instance_norm_act_inplace(Tensor x, std::optional<Tensor> residual, bool normalize_residual, double eps,
                               double negative_slope) {
  normalize(x, residual, normalize_residual, eps, negative_slope, x);
}

std::tuple<Tensor, std::optional<Tensor>> instance_norm_act_backward(Tensor grad_y, Tensor y, std::optional<Tensor> x,
                                                                     std::optional<Tensor> residual, Tensor statistics,
                                                                     bool has_residual, bool normalize_residual,
                                                                     double negative_slope) {
  const char* op = "instance_norm_act_backward";
  NormBackwardCall call{};
  describe(op, y, normalize_residual, negative_slope, &call);
  require_like(op, "grad_y", grad_y, y, "y");
  if (x) require_like(op, "x", *x, y, "y");
  if (residual) require_like(op, "residual", *residual, y, "y");
  require(x || (!has_residual && negative_slope > 0), op, "x is missing");
  require(residual || !normalize_residual, op, "residual is missing");
  require(has_residual || !normalize_residual, op, "normalize_residual needs a residual");
  require_dense(op, "statistics", statistics);
  require(shape(statistics) == Ints({call.batch, statistics_rows(call), call.channels}), op, "statistics has shape ",
          text(shape(statistics)));
  require(statistics.scalar_type() == accumulate_type(call.type), op, "statistics has the wrong dtype");
  Tensor grad_x = empty_on_large_pages(shape(y), y.scalar_type());
  std::optional<Tensor> grad_residual;
  if (has_residual) grad_residual = empty_on_large_pages(shape(y), y.scalar_type());
  if (call.batch == 0) return {grad_x, grad_residual};
  Tensor partials = partials_for(call, gradient_rows(call));
  Tensor means = torch::stable::empty(Ints{call.batch, gradient_rows(call), call.channels}, accumulate_type(call.type));
  const Tensor scratch = scratch_for(call);
  call.x = x ? x->const_data_ptr() : nullptr;
  call.residual = residual ? residual->const_data_ptr() : nullptr;
  call.statistics = statistics.mutable_data_ptr();
  call.partials = partials.mutable_data_ptr();
  call.output = y.const_data_ptr();
  call.grad_y = grad_y.const_data_ptr();
  call.grad_x = grad_x.mutable_data_ptr();
  call.grad_residual = grad_residual ? grad_residual->mutable_data_ptr() : nullptr;
  call.means = means.mutable_data_ptr();
  const DecoderKernels& table = kernels();
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { table.norm_backward_partials(call, b, e, s); });
  table.norm_backward_means(call);
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { table.norm_backward_apply(call, b, e, s); });
  return {grad_x, grad_residual};
}

void require_volume(const char* op, const char* name, const Tensor& t) {
  require_dense(op, name, t);
  require(t.scalar_type() == ScalarType::Float, op, name, " is not float32");
  require(t.dim() == 5 && t.numel() > 0, op, name, " has shape ", text(shape(t)), "; accepted is (B, D, H, W, C)");
}

// Memory for each of `workers`, which share a counter of work items: work(memory, next).
template <class Work>
void run_workers(int64_t workers, int64_t floats, const Work& work) {
  workers = std::clamp<int64_t>(workers, 1, torch::stable::get_num_threads());
  floats = (floats + 15) / 16 * 16;
  Tensor scratch = empty_on_large_pages(Ints{workers, floats}, ScalarType::Float);
  float* memory = static_cast<float*>(scratch.mutable_data_ptr());
  swin::WorkCounter next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(memory + i * floats, next);
  });
}

// A block of output rows is as high as keeps what it is computed from in a core's cache.
int64_t block_height(const ConvolutionCall& call) {
  constexpr int64_t kVoxels = 64, kBytes = int64_t{1} << 19, kLeast = 4, kMost = 16;
  if (call.kernel == 1) return kVoxels;
  const int64_t row_bytes = 18 * ((call.extent[2] + 3) / 4) * in_channels(call) * static_cast<int64_t>(sizeof(float));
  return std::min(std::clamp(kBytes / row_bytes - 2, kLeast, kMost), call.extent[1]);
}

// The gradient of a source has the weight's input channels from `first` on as outputs; a convolution has all of them
// as inputs.
Tensor convolve(const char* op, const Tensor& first_source, const std::optional<Tensor>& second_source,
                const Tensor& weight, bool gradient, int64_t first, int64_t count) {
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
  ConvolutionCall call{};
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
  // Long runs of planes transform few of them twice; enough runs keep many threads busy.
  constexpr int64_t kRuns = 64, kMostPlanes = 8;
  const int64_t across = (call.extent[1] + call.block_height - 1) / call.block_height;
  call.block_planes = std::clamp<int64_t>(call.batch * call.extent[0] * across / kRuns, 1, kMostPlanes);
  const DecoderKernels& table = kernels();
  Ints out_sizes = sizes;
  out_sizes.back() = call.out_channels;
  Tensor out = empty_on_large_pages(out_sizes, ScalarType::Float);
  call.out = static_cast<float*>(out.mutable_data_ptr());
  Tensor packed = torch::stable::empty(Ints{table.packed_weights(call)}, ScalarType::Float);
  call.packed = static_cast<float*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, table.pack_items(call), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) table.pack_weights(call, i);
  });
  run_workers(table.convolution_blocks(call), table.convolution_scratch(call),
              [&](float* scratch, swin::WorkCounter& next) { table.convolve(call, scratch, next); });
  return out;
}

Tensor convolution_forward(Tensor x, std::optional<Tensor> skip, Tensor weight) {
  return convolve("convolution", x, skip, weight, false, 0, 0);
}

Tensor convolution_backward_input(Tensor grad_out, Tensor weight, int64_t first, int64_t count) {
  return convolve("convolution_backward", grad_out, std::nullopt, weight, true, first, count);
}

// Of a 3×3×3 convolution's weight for the channels of x.
Tensor convolution_backward_weight(Tensor grad_out, Tensor x) {
  const char* op = "convolution_backward";
  require_volume(op, "grad_out", grad_out);
  require_volume(op, "x", x);
  const Ints sizes = shape(x);
  Ints like_x = shape(grad_out);
  like_x.back() = sizes.back();
  require(like_x == sizes, op, "grad_out has shape ", text(shape(grad_out)), "; it must be that of x, ", text(sizes),
          ", but for the channels");
  WeightGradientCall call{};
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
  // Slabs of their own, so that threads need not wait for one another, as many as little memory holds.
  constexpr int64_t kSlabs = 24, kBytes = int64_t{1} << 24;
  const DecoderKernels& table = kernels();
  const int64_t sums = table.weight_gradient_sums(call);
  call.slabs = std::clamp<int64_t>(kBytes / (sums * static_cast<int64_t>(sizeof(float))), 1,
                                   std::min(kSlabs, call.batch * call.extent[0]));
  Tensor memory = empty_on_large_pages(Ints{call.slabs, sums}, ScalarType::Float);
  call.sums = static_cast<float*>(memory.mutable_data_ptr());
  Tensor grad_weight = torch::stable::empty(Ints{call.out_channels, call.in_channels, 3, 3, 3}, ScalarType::Float);
  call.grad_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  run_workers(table.weight_gradient_items(call), table.weight_gradient_scratch(call),
              [&](float* scratch, swin::WorkCounter& next) { table.add_weight_gradient(call, scratch, next); });
  torch::stable::parallel_for(0, call.in_channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) table.finish_weight_gradient(call, i);
  });
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def(
      "instance_norm_act_forward(Tensor x, Tensor? residual, bool normalize_residual, float eps, "
      "float negative_slope) -> (Tensor, Tensor)");
  m.def(
      "instance_norm_act_inplace(Tensor(a!) x, Tensor? residual, bool normalize_residual, float eps, "
      "float negative_slope) -> ()");
  m.def(
      "instance_norm_act_backward(Tensor grad_y, Tensor y, Tensor? x, Tensor? residual, Tensor statistics, "
      "bool has_residual, bool normalize_residual, float negative_slope) -> (Tensor, Tensor?)");
  m.def("convolution_forward(Tensor x, Tensor? skip, Tensor weight) -> Tensor");
  m.def("convolution_backward_input(Tensor grad_out, Tensor weight, int first, int count) -> Tensor");
  m.def("convolution_backward_weight(Tensor grad_out, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("instance_norm_act_forward", TORCH_BOX(&instance_norm_act_forward));
  m.impl("instance_norm_act_inplace", TORCH_BOX(&instance_norm_act_inplace));
  m.impl("instance_norm_act_backward", TORCH_BOX(&instance_norm_act_backward));
  m.impl("convolution_forward", TORCH_BOX(&convolution_forward));
  m.impl("convolution_backward_input", TORCH_BOX(&convolution_backward_input));
  m.impl("convolution_backward_weight", TORCH_BOX(&convolution_backward_weight));
}
