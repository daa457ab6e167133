// The launchers of csrc/cuda and the planted kernels, for numpy arrays. Each array is copied to guarded memory of its
// exact size and back, outputs begin as poison, and whatever the emulator reports is raised as RuntimeError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/convolution.h"
#include "cuda/diagnostics.h"
#include "cuda/ptx.h"
#include "cuda/window_attention.h"
#include "cuda/window_partition.h"
#include "emulator.h"

namespace py = pybind11;

const char* run_planted(const std::string& kernel, const std::string& fault, const void* input, void* output);

namespace {

constexpr size_t kSkew = 16;  // tensors are promised to begin at a multiple of 16 bytes, of no more

// An array in the memory of the device.
class Tensor {
 public:
  enum Role { kInput, kOutput };
  Tensor(const char* name, std::optional<py::array> host, Role role) : name_(name), host_(host), role_(role) {
    if (!host) return;
    if (!(host->flags() & py::array::c_style)) throw std::invalid_argument(name_ + " is not contiguous");
    memory_ = std::make_unique<emulation::Guarded>(host->nbytes(), kSkew);
    if (role == kInput) std::memcpy(memory_->data(), host->data(), host->nbytes());
  }
  template <class T = void>
  T* data() const {
    return memory_ ? reinterpret_cast<T*>(memory_->data()) : nullptr;
  }
  // After the launch: nothing around the tensor was written, an input is as before, an output goes to its array.
  void finish() {
    if (!memory_) return;
    if (!memory_->intact()) throw std::runtime_error("something was written just before or behind " + name_);
    if (role_ == kOutput) {
      std::memcpy(host_->mutable_data(), memory_->data(), host_->nbytes());
    } else if (std::memcmp(host_->data(), memory_->data(), host_->nbytes()) != 0) {
      throw std::runtime_error(name_ + " is an input and was written");
    }
  }

 private:
  std::string name_;
  std::optional<py::array> host_;
  Role role_;
  std::unique_ptr<emulation::Guarded> memory_;
};

template <class... Tensors>
void finish(const char* problem, Tensors&... tensors) {
  if (problem) throw std::runtime_error(problem);
  (tensors.finish(), ...);
}

using Extents = std::vector<int64_t>;

swin::WindowGrid make_grid(const Extents& spatial, const Extents& nominal, const Extents& window,
                           const Extents& shift) {
  return swin::make_grid(static_cast<int>(spatial.size()), spatial.data(), nominal.data(), window.data(), shift.data());
}

#ifdef SWIN_HAVE_FORWARD
void forward(const SwinAttention& call, py::array qkv, py::array bias_table, std::optional<py::array> pad_qkv,
             py::array out, py::array lse) {
  Tensor in[] = {
      {"qkv", qkv, Tensor::kInput}, {"bias_table", bias_table, Tensor::kInput}, {"pad_qkv", pad_qkv, Tensor::kInput}};
  Tensor made[] = {{"out", out, Tensor::kOutput}, {"lse", lse, Tensor::kOutput}};
  const SwinAttentionForward tensors{in[0].data(), in[1].data(), in[2].data(), made[0].data(), made[1].data<float>()};
  emulation::Guarded workspace(swin_cuda_attention_forward_workspace_bytes(&call), kSkew);
  const char* problem = swin_cuda_attention_forward(&call, &tensors, workspace.data(), nullptr);
  if (!problem && !workspace.intact()) problem = "something was written just before or behind the workspace";
  finish(problem, in[0], in[1], in[2], made[0], made[1]);
}

#endif

#ifdef SWIN_HAVE_BACKWARD
void backward(const SwinAttention& call, py::array grad_out, py::array qkv, py::array bias_table,
              std::optional<py::array> pad_qkv, py::array out, py::array lse, py::array grad_qkv,
              py::array grad_bias_table, py::array grad_pad_qkv) {
  Tensor in[] = {
      {"grad_out", grad_out, Tensor::kInput}, {"qkv", qkv, Tensor::kInput}, {"bias_table", bias_table, Tensor::kInput},
      {"pad_qkv", pad_qkv, Tensor::kInput},   {"out", out, Tensor::kInput}, {"lse", lse, Tensor::kInput}};
  Tensor made[] = {{"grad_qkv", grad_qkv, Tensor::kOutput},
                   {"grad_bias_table", grad_bias_table, Tensor::kOutput},
                   {"grad_pad_qkv", grad_pad_qkv, Tensor::kOutput}};
  const SwinAttentionBackward tensors{in[0].data(),        in[1].data(),   in[2].data(),   in[3].data(),  in[4].data(),
                                      in[5].data<float>(), made[0].data(), made[1].data(), made[2].data()};
  emulation::Guarded workspace(swin_cuda_attention_backward_workspace_bytes(&call), kSkew);
  const char* problem = swin_cuda_attention_backward(&call, &tensors, workspace.data(), nullptr);
  if (!problem && !workspace.intact()) problem = "something was written just before or behind the workspace";
  finish(problem, in[0], in[1], in[2], in[3], in[4], in[5], made[0], made[1], made[2]);
}
#endif

using Move = const char*(const SwinPartition*, const void*, void*, void*);

template <Move* launcher>
void move(const SwinPartition& call, py::array from, py::array to) {
  Tensor in("the input", from, Tensor::kInput), made("the output", to, Tensor::kOutput);
  finish(launcher(&call, in.data(), made.data(), nullptr), in, made);
}

void convolve(const SwinConvolution& call, py::array x, std::optional<py::array> skip, py::array weight,
              py::array out) {
  Tensor in[] = {{"x", x, Tensor::kInput}, {"skip", skip, Tensor::kInput}, {"weight", weight, Tensor::kInput}};
  Tensor made("out", out, Tensor::kOutput);
  finish(swin_cuda_convolution(&call, in[0].data(), in[1].data(), in[2].data(), made.data(), nullptr), in[0], in[1],
         in[2], made);
}

void planted(const std::string& kernel, const std::string& fault, py::array input, py::array output) {
  Tensor in("the input", input, Tensor::kInput), made("the output", output, Tensor::kOutput);
  finish(run_planted(kernel, fault, in.data(), made.data()), in, made);
}

// As the operators of csrc/torch/cuda/window_attention.cpp of the same names.
template <class Cut>
Cut cut_of(const std::vector<int32_t>& values) {
  Cut cut;
  if (sizeof cut != values.size() * sizeof(int32_t)) throw std::invalid_argument("a cut has five quantities");
  std::memcpy(&cut, values.data(), sizeof cut);
  return cut;
}

void override_cut(bool backward, const std::vector<int32_t>& values) {
  if (backward) {
    const auto cut = values.empty() ? SwinBackwardCut{} : cut_of<SwinBackwardCut>(values);
    swin_cuda_override_backward_cut(values.empty() ? nullptr : &cut);
  } else {
    const auto cut = values.empty() ? SwinForwardCut{} : cut_of<SwinForwardCut>(values);
    swin_cuda_override_forward_cut(values.empty() ? nullptr : &cut);
  }
}

std::vector<int32_t> attention_cut(int element, int64_t batch, int64_t heads, int64_t head_dim, const Extents& spatial,
                                   const Extents& nominal, const Extents& window, const Extents& shift, bool backward) {
  const auto kind = static_cast<SwinElement>(element);
  const SwinAttention call{kind, kind, batch, heads, head_dim, make_grid(spatial, nominal, window, shift), 1};
  SwinForwardCut f{};
  SwinBackwardCut b{};
  const char* problem =
      backward ? swin_cuda_attention_backward_cut(&call, &b) : swin_cuda_attention_forward_cut(&call, &f);
  if (problem) throw std::runtime_error(problem);
  if (backward) return {b.key_warps, b.query_block, b.qkv_blocks, b.bias_warps, b.parts};
  return {f.warps, f.together, f.resident, f.chunks, f.parts};
}

// What `launcher` starts, without running it: address of the kernel within this file, grid, threads, shared bytes.
std::vector<std::tuple<intptr_t, std::array<unsigned, 3>, int, int64_t>> plan(
    const std::function<const char*(void* somewhere)>& launcher) {
  emulation::launches.clear();
  emulation::device.dry = true;
  alignas(256) static unsigned char somewhere[256];  // nobody looks
  const char* problem = launcher(somewhere);
  emulation::device.dry = false;
  if (problem) throw std::runtime_error(problem);
  std::vector<std::tuple<intptr_t, std::array<unsigned, 3>, int, int64_t>> planned;
  for (const emulation::Launch& one : emulation::launches) {
    planned.push_back(
        {emulation::address_in_file(one.kernel), {one.grid.x, one.grid.y, one.grid.z}, one.threads, one.shared_bytes});
  }
  return planned;
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  py::class_<SwinAttention>(m, "Attention")
      .def(py::init([](int element, int bias_element, int64_t batch, int64_t heads, int64_t head_dim,
                       const Extents& spatial, const Extents& nominal, const Extents& window, const Extents& shift,
                       double scale) {
        return SwinAttention{static_cast<SwinElement>(element),
                             static_cast<SwinElement>(bias_element),
                             batch,
                             heads,
                             head_dim,
                             make_grid(spatial, nominal, window, shift),
                             scale};
      }));
  py::class_<SwinPartition>(m, "Partition")
      .def(py::init([](int64_t element_bytes, int64_t batch, int64_t channels, const Extents& spatial,
                       const Extents& nominal, const Extents& window, const Extents& shift) {
        return SwinPartition{element_bytes, batch, channels, make_grid(spatial, nominal, window, shift)};
      }));
  py::class_<SwinConvolution>(m, "Convolution")
      .def(py::init([](int element, int64_t batch, const Extents& spatial, int64_t channels, int64_t skip_channels,
                       int64_t out_channels) {
        SwinConvolution call{static_cast<SwinElement>(element), batch, {}, channels, skip_channels, out_channels};
        std::copy(spatial.begin(), spatial.end(), call.spatial);
        return call;
      }));
  py::class_<emulation::Device>(m, "Device")
      .def_readwrite("compute_capability", &emulation::Device::compute_capability)
      .def_readwrite("multiprocessors", &emulation::Device::multiprocessors)
      .def_readwrite("shared_per_block", &emulation::Device::shared_per_block)
      .def_readwrite("shared_per_multiprocessor", &emulation::Device::shared_per_multiprocessor)
      .def_readwrite("reversed", &emulation::Device::reversed);
  m.def("device", [] { return &emulation::device; }, py::return_value_policy::reference);
  m.def("override_cut", &override_cut);
  m.def("attention_cut", &attention_cut);
  m.def("trace_launches", &swin_cuda_trace_launches);
  m.def("readable_kernel_name", &swin::readable_kernel_name);
#ifdef SWIN_HAVE_FORWARD
  m.def("forward_workspace_bytes", &swin_cuda_attention_forward_workspace_bytes);
  m.def("forward_declines", [](const SwinAttention& call) { return swin_cuda_attention_forward_declines(&call); });
  m.def("forward", &forward);
  m.def("plan_forward", [](const SwinAttention& call) {
    return plan([&](void* p) {
      const SwinAttentionForward tensors{p, p, p, p, static_cast<float*>(p)};
      return swin_cuda_attention_forward(&call, &tensors, p, nullptr);
    });
  });
#endif
#ifdef SWIN_HAVE_BACKWARD
  m.def("backward_workspace_bytes", &swin_cuda_attention_backward_workspace_bytes);
  m.def("backward_declines", [](const SwinAttention& call) { return swin_cuda_attention_backward_declines(&call); });
  m.def("backward", &backward);
  m.def("plan_backward", [](const SwinAttention& call) {
    return plan([&](void* p) {
      const SwinAttentionBackward tensors{p, p, p, p, p, static_cast<float*>(p), p, p, p};
      return swin_cuda_attention_backward(&call, &tensors, p, nullptr);
    });
  });
#endif
  m.def("partition", &move<swin_cuda_window_partition>);
  m.def("reverse", &move<swin_cuda_window_reverse>);
  m.def("plan_partition", [](const SwinPartition& call) {
    return plan([&](void* p) { return swin_cuda_window_partition(&call, p, p, nullptr); });
  });
  m.def("plan_reverse", [](const SwinPartition& call) {
    return plan([&](void* p) { return swin_cuda_window_reverse(&call, p, p, nullptr); });
  });
  m.def("convolve", &convolve);
  m.def("plan_convolution", [](const SwinConvolution& call) {
    return plan([&](void* p) { return swin_cuda_convolution(&call, p, p, p, p, nullptr); });
  });
  m.def("planted", &planted);
  m.def("to_bfloat16", py::vectorize([](float x) { return swin::from_float<swin::BFloat16>(x).bits; }));
  m.def("to_float16",
        py::vectorize([](float x) { return std::bit_cast<uint16_t>(swin::from_float<swin::Float16>(x)); }));
  m.def("exp2_approx", py::vectorize([](float x) { return swin::exp2_approx(x); }));
  m.def("log2_approx", py::vectorize([](float x) { return swin::log2_approx(x); }));
  m.def("reciprocal_approx", py::vectorize([](float x) { return swin::reciprocal_approx(x); }));
}
