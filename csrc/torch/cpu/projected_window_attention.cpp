// Window attention with its projections inside on the CPU as torch operators.
#include "cpu/projected_window_attention/kernels.h"
#include "torch/cpu/attention.h"

namespace swin_torch {
namespace {

constexpr int64_t kBackwardChunk = 8;  // windows of an item of work, with all heads

// Whether qkv = x · weightᵀ + bias of `channels` channels can be computed window by window, inside the attention.
bool projects(int64_t heads, int64_t channels, bool backward) {
  require(heads >= 1 && channels >= 1, "projects", "heads is ", heads, " and channels is ", channels,
          "; accepted are 1 and more");
  swin::AttentionCall call{};
  call.heads = heads;
  call.head_dim = channels / heads;
  if (channels % heads != 0) return false;
  const swin::Build build = build_here();
  return backward ? swin::projects_backward[build](call) : swin::projects_forward[build](call);
}

// Checks and fills in what forward and backward share.
template <class ProjectedCall>
void set_projection(const char* op, bool backward, const Attention& attention, const Tensor& x, const Tensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                    std::optional<double> norm_eps, const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                    ProjectedCall& call) {
  require(projects(call.heads, attention.channels, backward) && call.type == swin::ElementType::kFloat32 &&
              call.bias_type == call.type,
          op, "has no kernel for ", call.heads, " heads of ", call.head_dim, " channels in this dtype here");
  require_shape(op, "weight", weight, {3 * attention.channels, attention.channels});
  require(weight.scalar_type() == x.scalar_type(), op, "weight must have the dtype of x");
  const auto given = [&](const char* name, const OptionalTensor& t, const Ints& wanted) -> const float* {
    if (!t) return nullptr;
    require_shape(op, name, *t, wanted);
    require(t->scalar_type() == x.scalar_type(), op, name, " must have the dtype of x");
    return static_cast<const float*>(t->const_data_ptr());
  };
  call.normalize = norm_eps.has_value();
  call.norm_weight = given("norm_weight", norm_weight, {attention.channels});
  call.norm_bias = given("norm_bias", norm_bias, {attention.channels});
  call.norm_eps = static_cast<float>(norm_eps.value_or(0));
  call.qkv = nullptr;
  call.pad_qkv = nullptr;
  call.x = static_cast<const float*>(x.const_data_ptr());
  call.weight = static_cast<const float*>(weight.const_data_ptr());
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  require(out_weight || !out_bias, op, "out_bias is given without out_weight");
  call.out_weight = given("out_weight", out_weight, {attention.channels, attention.channels});
  call.out_bias = given("out_bias", out_bias, {attention.channels});
}

// The result; and for a gradient, the attention's output if a layer follows it, and the log-sum-exp.
std::tuple<Tensor, Tensor, Tensor> projected_window_attention_forward(
    Tensor x, Tensor weight, OptionalTensor bias, Tensor bias_table, OptionalTensor norm_weight,
    OptionalTensor norm_bias, std::optional<double> norm_eps, OptionalTensor out_weight, OptionalTensor out_bias,
    Ints nominal, Ints window, Ints shift, double scale, bool for_backward) {
  const char* op = "projected_window_attention";
  swin::ProjectedForwardCall call{};
  const Attention attention(op, x, bias_table, bias, std::nullopt, nominal, window, shift, scale, 0, call, 3);
  set_projection(op, false, attention, x, weight, bias, norm_weight, norm_bias, norm_eps, out_weight, out_bias, call);
  Tensor out = empty_on_large_pages(shape(x), x.scalar_type());
  const bool apart = for_backward && out_weight;
  Tensor attended =
      apart ? empty_on_large_pages(shape(x), x.scalar_type()) : torch::stable::empty(Ints{0}, x.scalar_type());
  Tensor lse =
      torch::stable::empty(for_backward ? attention.with_channels(call.heads) : Ints{0}, attention.accumulated);
  call.out = (apart ? attended : out).mutable_data_ptr();
  call.projected_out = static_cast<float*>(out.mutable_data_ptr());
  call.lse = for_backward ? lse.mutable_data_ptr() : nullptr;
  if (call.batch > 0) {
    const swin::Build build = build_here();
    attention.prepare_bias(build, call);
    const std::vector<swin::WindowChunk> chunks = window_chunks(call, kForwardChunk);
    const int64_t count = static_cast<int64_t>(chunks.size());
    attention.share(swin::projected_forward_scratch[build](call), [&](void* scratch, swin::WorkCounter& next) {
      swin::projected_forward[build](call, chunks.data(), count, scratch, next);
    });
  }
  return {out, attended, lse};
}

std::tuple<Tensor, Tensor, Tensor> projected_window_attention_backward(
    Tensor grad_out, Tensor x, Tensor weight, OptionalTensor bias, Tensor bias_table, OptionalTensor norm_weight,
    OptionalTensor norm_bias, std::optional<double> norm_eps, OptionalTensor out_weight, OptionalTensor out_bias,
    Tensor attended, Tensor lse, Ints nominal, Ints window, Ints shift, double scale) {
  const char* op = "projected_window_attention_backward";
  swin::ProjectedBackwardCall call{};
  const Attention attention(op, x, bias_table, bias, std::nullopt, nominal, window, shift, scale, 0, call, 3);
  set_projection(op, true, attention, x, weight, bias, norm_weight, norm_bias, norm_eps, out_weight, out_bias, call);
  require_shape(op, "grad_out", grad_out, shape(x));
  require_shape(op, "attended", attended, shape(x));
  require_shape(op, "lse", lse, attention.with_channels(call.heads));
  require(grad_out.scalar_type() == x.scalar_type(), op, "grad_out must have the dtype of x");
  require(attended.scalar_type() == x.scalar_type(), op, "attended must have the dtype of x");
  require(lse.scalar_type() == attention.accumulated, op, "lse must be float32");

  const int64_t parameters = swin::projection_parameters(attention.channels);
  Tensor grad_x = empty_on_large_pages(shape(x), x.scalar_type());
  if (call.batch == 0) return {grad_x, zeros({parameters}, x), zeros(shape(bias_table), bias_table)};
  Tensor grad_projection = torch::stable::empty(Ints{parameters}, x.scalar_type());
  Tensor grad_bias_table = torch::stable::empty(shape(bias_table), bias_table.scalar_type());
  const std::vector<swin::WindowChunk> chunks = window_chunks(call, kBackwardChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t table_length = swin::bias_table_length(attention.plan.grid);
  const Buffer bias_partials = allocate(sizeof(float) * static_cast<size_t>(count * table_length));
  const Buffer bias_sums = allocate(sizeof(float) * static_cast<size_t>(call.heads * table_length));
  const Buffer projection_partials = allocate(sizeof(float) * static_cast<size_t>(count / call.heads * parameters));
  call.grad_out = grad_out.const_data_ptr();
  call.attended = static_cast<const float*>(attended.const_data_ptr());
  call.lse = lse.const_data_ptr();
  call.grad_bias_table = grad_bias_table.mutable_data_ptr();
  call.bias_partials = bias_partials.get();
  call.bias_sums = bias_sums.get();
  call.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  call.grad_projection = static_cast<float*>(grad_projection.mutable_data_ptr());
  call.projection_partials = static_cast<float*>(projection_partials.get());

  const swin::Build build = build_here();
  attention.prepare_bias(build, call);
  attention.share(swin::projected_backward_scratch[build](call), [&](void* scratch, swin::WorkCounter& next) {
    swin::projected_backward[build](call, chunks.data(), count, scratch, next);
  });
  share_items(attention.workers, [&](swin::WorkCounter& next) {
    swin::reduce_projected_gradients[build](call, chunks.data(), count, next);
  });
  return {grad_x, grad_projection, grad_bias_table};
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def(
      "projected_window_attention_forward(Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, "
      "Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, Tensor? out_weight, Tensor? out_bias, "
      "int[] nominal, int[] window, int[] shift, float scale, bool for_backward) -> (Tensor, Tensor, Tensor)");
  m.def(
      "projected_window_attention_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, Tensor? out_weight, "
      "Tensor? out_bias, Tensor attended, Tensor lse, int[] nominal, int[] window, int[] shift, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("projects(int heads, int channels, bool backward) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("projected_window_attention_forward", TORCH_BOX(&swin_torch::projected_window_attention_forward));
  m.impl("projected_window_attention_backward", TORCH_BOX(&swin_torch::projected_window_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("projects", TORCH_BOX(&swin_torch::projects));
}
