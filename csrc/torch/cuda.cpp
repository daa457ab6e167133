// The CUDA kernels as operators of torch, through the stable ABI: checks, allocation, device and stream.
// It needs no CUDA header and links nothing of torch for CUDA: it builds and loads beside a torch for the CPU.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/launchers.h"
#include "torch/checks.h"

namespace {

using swin_torch::grid_of;
using swin_torch::Ints;
using swin_torch::require;
using swin_torch::shape;
using swin_torch::text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

void require_dense(const char* op, const char* name, const Tensor& t, int32_t device) {
  require(t.is_cuda() && t.get_device_index() == device, op, name, " is not on CUDA device ", device);
  require(t.is_contiguous(), op, name, " is not contiguous");
}

void require_like(const char* op, const char* name, const Tensor& t, const Ints& sizes, ScalarType type,
                  int32_t device) {
  require_dense(op, name, t, device);
  require(shape(t) == sizes, op, name, " has shape ", text(shape(t)), "; accepted is ", text(sizes));
  require(t.scalar_type() == type, op, name, " has another dtype than the call needs");
}

void require_launched(const char* op, const char* error) { require(error == nullptr, op, error ? error : ""); }

// PyTorch's current stream of the device, a cudaStream_t. libtorch_cuda.so, which Python loads privately, has it.
void* current_stream(int32_t device) {
  using CurrentStream = AOTITorchError (*)(int32_t, void**);
  static const CurrentStream ask = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<CurrentStream>(symbol);
  }();
  require(ask != nullptr, "swin_kernels_cuda", "this torch has no libtorch_cuda.so in memory");
  void* stream = nullptr;
  require(ask(device, &stream) == 0, "swin_kernels_cuda", "torch knows no current stream of device ", device);
  return stream;
}

// `t`, or a copy where it is a view that does not begin at a multiple of the 16 bytes the kernels read at once.
Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

SwinElement element_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kSwinFloat32;
    case ScalarType::BFloat16: return kSwinBFloat16;
    case ScalarType::Half: return kSwinFloat16;
    default: require(false, op, name, " has a dtype that is not float32, bfloat16 or float16");
  }
  return kSwinFloat32;
}

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

// A call of unknown extents, but for its windows. `element` is a SwinElement.
SwinAttention call_of(const char* op, int64_t element, const Ints& spatial, const Ints& nominal, const Ints& window,
                      const Ints& shift) {
  require(element >= kSwinFloat32 && element <= kSwinFloat16, op, "element is ", element, "; accepted are 0, 1, 2");
  SwinAttention call{};
  call.element = call.bias_element = static_cast<SwinElement>(element);
  call.grid = grid_of(op, spatial, nominal, window, shift);
  call.scale = 1;
  return call;
}

// Why the current device cannot run window_attention on windows of `window` tokens, "" where it can.
std::string attention_declines(int64_t element, int64_t head_dim, Ints window, bool backward) {
  const char* op = "attention_declines";
  SwinAttention call = call_of(op, element, window, window, window, Ints(window.size(), 0));
  call.batch = 65535;  // as many windows as an override of the cut may deal out: how many a call has is not asked here
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

// Overrides the cut of all calls by those fields; without values ends it.
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

void trace_launches(int64_t fd) {
  require(fd >= -1 && fd <= INT32_MAX, "trace_launches", "fd is ", fd, "; accepted are file descriptors, and -1");
  swin_cuda_trace_launches(static_cast<int>(fd));
}

}  // namespace

STABLE_TORCH_LIBRARY(swin_kernels_cuda, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, int[] nominal, int[] window, "
      "int[] shift, float scale) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor out, "
      "Tensor lse, int[] nominal, int[] window, int[] shift, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("window_partition(Tensor x, int[] window, int[] shift) -> Tensor");
  m.def("window_reverse(Tensor windows, int[] window, int[] shift, int[] spatial) -> Tensor");
  m.def("convolution_forward(Tensor x, Tensor? skip, Tensor weight) -> Tensor");
  m.def("attention_declines(int element, int head_dim, int[] window, bool backward) -> str");
  m.def(
      "attention_cut(int element, int batch, int heads, int head_dim, int[] spatial, int[] nominal, int[] window, "
      "int[] shift, bool backward) -> int[]");
  m.def("override_cut(bool backward, int[] values) -> ()");
  m.def("trace_launches(int fd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CUDA, m) {
  m.impl("window_attention_forward", TORCH_BOX(&window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
  m.impl("window_partition", TORCH_BOX(&window_partition));
  m.impl("window_reverse", TORCH_BOX(&window_reverse));
  m.impl("convolution_forward", TORCH_BOX(&convolution_forward));
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("attention_declines", TORCH_BOX(&attention_declines));
  m.impl("attention_cut", TORCH_BOX(&attention_cut));
  m.impl("override_cut", TORCH_BOX(&override_cut));
  m.impl("trace_launches", TORCH_BOX(&trace_launches));
}
