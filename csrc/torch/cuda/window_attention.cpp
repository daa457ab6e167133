// Window attention on the GPU as torch operators.
#include "cuda/window_attention.h"

#include "torch/cuda/cuda.h"

namespace swin_torch {
namespace {

// The arguments that forward and backward share, checked.
struct Attention {
  SwinAttention call{};
  int32_t device;
  Ints volume;  // (B, *S)

  Attention(const char* op, const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& pad_qkv,
            const Ints& nominal, const Ints& window, const Ints& shift, double scale)
      : device(qkv.get_device_index()), volume(shape(qkv)) {
    require(volume.size() == 4 || volume.size() == 5, op, "qkv has shape ", text(volume),
            "; accepted is (B, H, W, 3C) or (B, D, H, W, 3C)");
    require_dense(op, "qkv", qkv, device);
    const int64_t qkv_channels = volume.back();
    volume.pop_back();
    call.grid = grid_of(op, Ints(volume.begin() + 1, volume.end()), nominal, window, shift);
    const int64_t table_length = swin::bias_table_length(call.grid);
    require(bias_table.dim() == 2 && bias_table.size(0) == table_length && bias_table.size(1) >= 1, op,
            "bias_table has shape ", text(shape(bias_table)), "; accepted is (", table_length, ", heads)");
    require_dense(op, "bias_table", bias_table, device);
    call.heads = bias_table.size(1);
    require(qkv_channels > 0 && qkv_channels % (3 * call.heads) == 0, op, "qkv has ", qkv_channels, " channels; with ",
            call.heads, " heads it must be a multiple of ", 3 * call.heads);
    call.element = element_of(op, "qkv", qkv);
    call.bias_element = element_of(op, "bias_table", bias_table);
    require(call.bias_element == call.element || call.bias_element == kSwinFloat32, op,
            "bias_table must have the dtype of qkv or float32");
    if (pad_qkv) require_like(op, "pad_qkv", *pad_qkv, {qkv_channels}, qkv.scalar_type(), device);
    call.batch = volume.front();
    call.head_dim = qkv_channels / (3 * call.heads);
    call.scale = scale;
  }

  int64_t channels() const { return call.heads * call.head_dim; }

  Ints with_channels(int64_t c) const {
    Ints sizes = volume;
    sizes.push_back(c);
    return sizes;
  }
};

std::tuple<Tensor, Tensor> window_attention_forward(Tensor qkv, Tensor bias_table, std::optional<Tensor> pad_qkv,
                                                    Ints nominal, Ints window, Ints shift, double scale) {
  const char* op = "window_attention";
  const Attention attention(op, qkv, bias_table, pad_qkv, nominal, window, shift, scale);
  const DeviceGuard guard(attention.device);
  qkv = aligned(qkv), bias_table = aligned(bias_table);
  if (pad_qkv) pad_qkv = aligned(*pad_qkv);
  Tensor out = torch::stable::new_empty(qkv, attention.with_channels(attention.channels()));
  Tensor lse = torch::stable::new_empty(qkv, attention.with_channels(attention.call.heads), ScalarType::Float);
  if (attention.call.batch == 0) return {out, lse};
  require_launched(op, swin_cuda_attention_forward_declines(&attention.call));
  Tensor workspace = torch::stable::new_empty(qkv, Ints{swin_cuda_attention_forward_workspace_bytes(&attention.call)},
                                              ScalarType::Byte);
  SwinAttentionForward tensors{};
  tensors.qkv = qkv.const_data_ptr();
  tensors.bias_table = bias_table.const_data_ptr();
  tensors.pad_qkv = pad_qkv ? pad_qkv->const_data_ptr() : nullptr;
  tensors.out = out.mutable_data_ptr();
  tensors.lse = static_cast<float*>(lse.mutable_data_ptr());
  require_launched(op, swin_cuda_attention_forward(&attention.call, &tensors, workspace.mutable_data_ptr(),
                                                   current_stream(attention.device)));
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table,
                                                             std::optional<Tensor> pad_qkv, Tensor out, Tensor lse,
                                                             Ints nominal, Ints window, Ints shift, double scale) {
  const char* op = "window_attention_backward";
  const Attention attention(op, qkv, bias_table, pad_qkv, nominal, window, shift, scale);
  const DeviceGuard guard(attention.device);
  const Ints out_shape = attention.with_channels(attention.channels());
  require_like(op, "grad_out", grad_out, out_shape, qkv.scalar_type(), attention.device);
  require_like(op, "out", out, out_shape, qkv.scalar_type(), attention.device);
  require_like(op, "lse", lse, attention.with_channels(attention.call.heads), ScalarType::Float, attention.device);
  grad_out = aligned(grad_out), qkv = aligned(qkv), bias_table = aligned(bias_table);
  out = aligned(out), lse = aligned(lse);
  if (pad_qkv) pad_qkv = aligned(*pad_qkv);
  Tensor grad_qkv = torch::stable::new_empty(qkv, shape(qkv));
  if (attention.call.batch == 0) {
    return {grad_qkv, torch::stable::new_zeros(bias_table, shape(bias_table)),
            torch::stable::new_zeros(qkv, Ints{3 * attention.channels()})};
  }
  require_launched(op, swin_cuda_attention_backward_declines(&attention.call));
  Tensor grad_bias_table = torch::stable::new_empty(bias_table, shape(bias_table));
  Tensor grad_pad_qkv = torch::stable::new_empty(qkv, Ints{3 * attention.channels()});
  Tensor workspace = torch::stable::new_empty(qkv, Ints{swin_cuda_attention_backward_workspace_bytes(&attention.call)},
                                              ScalarType::Byte);
  SwinAttentionBackward tensors{};
  tensors.grad_out = grad_out.const_data_ptr();
  tensors.qkv = qkv.const_data_ptr();
  tensors.bias_table = bias_table.const_data_ptr();
  tensors.pad_qkv = pad_qkv ? pad_qkv->const_data_ptr() : nullptr;
  tensors.out = out.const_data_ptr();
  tensors.lse = static_cast<const float*>(lse.const_data_ptr());
  tensors.grad_qkv = grad_qkv.mutable_data_ptr();
  tensors.grad_bias_table = grad_bias_table.mutable_data_ptr();
  tensors.grad_pad_qkv = grad_pad_qkv.mutable_data_ptr();
  require_launched(op, swin_cuda_attention_backward(&attention.call, &tensors, workspace.mutable_data_ptr(),
                                                    current_stream(attention.device)));
  return {grad_qkv, grad_bias_table, grad_pad_qkv};
}

// A call whose extents are unknown except for its windows. `element` is a SwinElement.
SwinAttention call_of(const char* op, int64_t element, const Ints& spatial, const Ints& nominal, const Ints& window,
                      const Ints& shift) {
  require(element >= kSwinFloat32 && element <= kSwinFloat16, op, "element is ", element, "; accepted are 0, 1, 2");
  SwinAttention call{};
  call.element = call.bias_element = static_cast<SwinElement>(element);
  call.grid = grid_of(op, spatial, nominal, window, shift);
  call.scale = 1;
  return call;
}

// Why the current device cannot run window_attention on windows of `window` tokens, "" if it can.
std::string attention_declines(int64_t element, int64_t head_dim, Ints window, bool backward) {
  const char* op = "attention_declines";
  SwinAttention call = call_of(op, element, window, window, window, Ints(window.size(), 0));
  call.batch = 65535;  // as many windows as an override of the cut may divide: the number in a call is not known here
  call.heads = 1;
  call.head_dim = head_dim;
  const char* reason =
      backward ? swin_cuda_attention_backward_declines(&call) : swin_cuda_attention_forward_declines(&call);
  return reason ? reason : "";
}

// How a call is cut on the current device: the fields of SwinForwardCut or SwinBackwardCut.
Ints attention_cut(int64_t element, int64_t batch, int64_t heads, int64_t head_dim, Ints spatial, Ints nominal,
                   Ints window, Ints shift, bool backward) {
  const char* op = "attention_cut";
  SwinAttention call = call_of(op, element, spatial, nominal, window, shift);
  require(batch >= 1 && heads >= 1, op, "batch is ", batch, " and heads is ", heads, "; accepted are 1 and more");
  call.batch = batch, call.heads = heads, call.head_dim = head_dim;
  if (backward) {
    SwinBackwardCut cut{};
    require_launched(op, swin_cuda_attention_backward_cut(&call, &cut));
    return {cut.key_warps, cut.query_block, cut.qkv_blocks, cut.bias_warps, cut.parts};
  }
  SwinForwardCut cut{};
  require_launched(op, swin_cuda_attention_forward_cut(&call, &cut));
  return {cut.warps, cut.together, cut.resident, cut.chunks, cut.parts};
}

// Overrides the cut of all calls with those fields; without values, ends the override.
void override_cut(bool backward, Ints values) {
  const char* op = "override_cut";
  require(values.empty() || values.size() == 5, op, "values are ", text(values), "; accepted are none or five");
  int32_t five[5] = {};
  for (size_t i = 0; i < values.size(); ++i) {
    require(values[i] >= -1 && values[i] <= INT32_MAX, op, "values are ", text(values),
            "; each must be -1 to 2^31 - 1");
    five[i] = static_cast<int32_t>(values[i]);
  }
  if (backward) {
    const SwinBackwardCut cut{five[0], five[1], five[2], five[3], five[4]};
    swin_cuda_override_backward_cut(values.empty() ? nullptr : &cut);
  } else {
    const SwinForwardCut cut{five[0], five[1], five[2], five[3], five[4]};
    swin_cuda_override_forward_cut(values.empty() ? nullptr : &cut);
  }
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cuda, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, int[] nominal, int[] window, "
      "int[] shift, float scale) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor out, "
      "Tensor lse, int[] nominal, int[] window, int[] shift, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("attention_declines(int element, int head_dim, int[] window, bool backward) -> str");
  m.def(
      "attention_cut(int element, int batch, int heads, int head_dim, int[] spatial, int[] nominal, int[] window, "
      "int[] shift, bool backward) -> int[]");
  m.def("override_cut(bool backward, int[] values) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CUDA, m) {
  m.impl("window_attention_forward", TORCH_BOX(&swin_torch::window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&swin_torch::window_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_declines", TORCH_BOX(&swin_torch::attention_declines));
  m.impl("attention_cut", TORCH_BOX(&swin_torch::attention_cut));
  m.impl("override_cut", TORCH_BOX(&swin_torch::override_cut));
}
