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

using swin::DecoderKernels;
using swin::ElementType;
using swin::NormBackwardCall;
using swin::NormCall;
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
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("instance_norm_act_forward", TORCH_BOX(&instance_norm_act_forward));
  m.impl("instance_norm_act_inplace", TORCH_BOX(&instance_norm_act_inplace));
  m.impl("instance_norm_act_backward", TORCH_BOX(&instance_norm_act_backward));
}
