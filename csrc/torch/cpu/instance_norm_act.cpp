// Instance norm, residual and LeakyReLU on the CPU as torch operators.
#include <algorithm>

#include "cpu/instance_norm_act/kernels.h"
#include "torch/cpu/cpu.h"

namespace swin_torch {
namespace {

// A block of voxels is small enough to stay in a core's cache between the two passes over it, and to be summed plainly.
// Its size is fixed, so that sums have one order for any number of threads.
constexpr int64_t kBlockElements = 16384, kBlockVoxels = 256;

// What both directions share; `like` is a volume (B, *S, C).
void describe(const char* op, const Tensor& like, bool normalize_residual, double negative_slope,
              swin::NormCall* call) {
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

// Runs work(begin, end, scratch) over all blocks, with an equal share on each thread.
template <class Work>
void over_blocks(const swin::NormCall& call, const Tensor& scratch, const Work& work) {
  const int64_t total = call.batch * call.blocks, shares = scratch.size(0);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  const int64_t bytes = scratch.size(1) * static_cast<int64_t>(scratch.element_size());
  run_workers(shares, [&](int64_t i) { work(total * i / shares, total * (i + 1) / shares, memory + i * bytes); });
}

Tensor scratch_for(const swin::NormCall& call) {
  const int64_t shares = std::clamp<int64_t>(call.batch * call.blocks, 1, torch::stable::get_num_threads());
  return torch::stable::empty(Ints{shares, swin::kNormScratchTensors * swin::kNormScratchRows * call.channels},
                              accumulate_type(call.type));
}

Tensor partials_for(const swin::NormCall& call, int64_t rows) {
  return torch::stable::empty(Ints{call.batch * call.blocks, rows, call.channels}, accumulate_type(call.type));
}

// y and the statistics of a call into `y`, which may be x itself.
Tensor normalize(const Tensor& x, const OptionalTensor& residual, bool normalize_residual, double eps,
                 double negative_slope, const Tensor& y) {
  const char* op = "instance_norm_act";
  swin::NormCall call{};
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
  const swin::Build build = build_here();
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { swin::norm_partials[build](call, b, e, s); });
  swin::norm_statistics[build](call);
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { swin::norm_apply[build](call, b, e, s); });
  return statistics;
}

std::tuple<Tensor, Tensor> instance_norm_act_forward(Tensor x, OptionalTensor residual, bool normalize_residual,
                                                     double eps, double negative_slope) {
  Tensor y = empty_on_large_pages(shape(x), x.scalar_type());
  Tensor statistics = normalize(x, residual, normalize_residual, eps, negative_slope, y);
  return {y, statistics};
}

void instance_norm_act_inplace(Tensor x, OptionalTensor residual, bool normalize_residual, double eps,
                               double negative_slope) {
  normalize(x, residual, normalize_residual, eps, negative_slope, x);
}

std::tuple<Tensor, OptionalTensor> instance_norm_act_backward(Tensor grad_y, Tensor y, OptionalTensor x,
                                                              OptionalTensor residual, Tensor statistics,
                                                              bool has_residual, bool normalize_residual,
                                                              double negative_slope) {
  const char* op = "instance_norm_act_backward";
  swin::NormBackwardCall call{};
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
  OptionalTensor grad_residual;
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
  const swin::Build build = build_here();
  over_blocks(call, scratch,
              [&](int64_t b, int64_t e, void* s) { swin::norm_backward_partials[build](call, b, e, s); });
  swin::norm_backward_means[build](call);
  over_blocks(call, scratch, [&](int64_t b, int64_t e, void* s) { swin::norm_backward_apply[build](call, b, e, s); });
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace swin_torch

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
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("instance_norm_act_forward", TORCH_BOX(&swin_torch::instance_norm_act_forward));
  m.impl("instance_norm_act_inplace", TORCH_BOX(&swin_torch::instance_norm_act_inplace));
  m.impl("instance_norm_act_backward", TORCH_BOX(&swin_torch::instance_norm_act_backward));
}
