// Window attention on the CPU as torch operators.
#include "cpu/window_attention/kernels.h"
#include "torch/cpu/attention.h"

namespace swin_torch {
namespace {

constexpr int64_t kBackwardChunk = 24;  // windows of an item of work

std::tuple<Tensor, Tensor> window_attention_forward(Tensor qkv, Tensor bias_table, OptionalTensor pad_qkv,
                                                    OptionalTensor seed, Ints nominal, Ints window, Ints shift,
                                                    double scale, double dropout_p) {
  const char* op = "window_attention";
  swin::ForwardCall call{};
  const Attention attention(op, qkv, bias_table, pad_qkv, seed, nominal, window, shift, scale, dropout_p, call);
  Tensor out = empty_on_large_pages(attention.with_channels(attention.channels), qkv.scalar_type());
  Tensor lse = torch::stable::empty(attention.with_channels(call.heads), attention.accumulated);
  call.out = out.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr();
  if (call.batch > 0) {
    const swin::Build build = build_here();
    attention.prepare_bias(build, call);
    const std::vector<swin::WindowChunk> chunks = window_chunks(call, kForwardChunk);
    const int64_t count = static_cast<int64_t>(chunks.size());
    attention.share(swin::attention_forward_scratch[build](call), [&](void* scratch, swin::WorkCounter& next) {
      swin::attention_forward[build](call, chunks.data(), count, scratch, next);
    });
  }
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table,
                                                             OptionalTensor pad_qkv, OptionalTensor seed, Tensor out,
                                                             Tensor lse, Ints nominal, Ints window, Ints shift,
                                                             double scale, double dropout_p) {
  const char* op = "window_attention_backward";
  swin::BackwardCall call{};
  const Attention attention(op, qkv, bias_table, pad_qkv, seed, nominal, window, shift, scale, dropout_p, call);
  const Ints out_shape = attention.with_channels(attention.channels);
  require_shape(op, "grad_out", grad_out, out_shape);
  require_shape(op, "out", out, out_shape);
  require_shape(op, "lse", lse, attention.with_channels(call.heads));
  require(grad_out.scalar_type() == qkv.scalar_type(), op, "grad_out must have the dtype of qkv");
  require(out.scalar_type() == qkv.scalar_type(), op, "out must have the dtype of qkv");
  require(lse.scalar_type() == attention.accumulated, op, "lse must be float32, or float64 for float64 qkv");

  Tensor grad_qkv = empty_on_large_pages(shape(qkv), qkv.scalar_type());
  if (call.batch == 0) return {grad_qkv, zeros(shape(bias_table), bias_table), zeros({3 * attention.channels}, qkv)};
  Tensor grad_bias_table = torch::stable::empty(shape(bias_table), bias_table.scalar_type());
  Tensor grad_pad_qkv = torch::stable::empty(Ints{3 * attention.channels}, qkv.scalar_type());
  const std::vector<swin::WindowChunk> chunks = window_chunks(call, kBackwardChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const size_t table_bytes =
      attention.accumulate_bytes * static_cast<size_t>(swin::bias_table_length(attention.plan.grid));
  const Buffer bias_partials = allocate(table_bytes * static_cast<size_t>(count));
  const Buffer bias_sums = allocate(table_bytes * static_cast<size_t>(call.heads));
  const Buffer pad_partials = allocate(attention.accumulate_bytes * static_cast<size_t>(count * 2 * call.head_dim));
  call.grad_out = grad_out.const_data_ptr();
  call.lse = lse.const_data_ptr();
  call.grad_qkv = grad_qkv.mutable_data_ptr();
  call.grad_bias_table = grad_bias_table.mutable_data_ptr();
  call.grad_pad_qkv = grad_pad_qkv.mutable_data_ptr();
  call.bias_partials = bias_partials.get();
  call.bias_sums = bias_sums.get();
  call.pad_partials = pad_partials.get();

  const swin::Build build = build_here();
  attention.prepare_bias(build, call);
  attention.share(swin::attention_backward_scratch[build](call), [&](void* scratch, swin::WorkCounter& next) {
    swin::attention_backward[build](call, chunks.data(), count, scratch, next);
  });
  share_items(attention.workers,
              [&](swin::WorkCounter& next) { swin::reduce_gradients[build](call, chunks.data(), count, next); });
  return {grad_qkv, grad_bias_table, grad_pad_qkv};
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, int[] nominal, "
      "int[] window, int[] shift, float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, "
      "Tensor out, Tensor lse, int[] nominal, int[] window, int[] shift, float scale, float dropout_p) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&swin_torch::window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&swin_torch::window_attention_backward));
}
