// What the CUDA registrations of all operators share: checks of tensors, device and stream.
// It needs no CUDA header and links no CUDA part of torch: it builds and loads with a torch for the CPU.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>

#include "cuda/elements.h"
#include "torch/checks.h"

namespace swin_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline void require_dense(const char* op, const char* name, const Tensor& t, int32_t device) {
  require(t.is_cuda() && t.get_device_index() == device, op, name, " is not on CUDA device ", device);
  require(t.is_contiguous(), op, name, " is not contiguous");
}

inline void require_like(const char* op, const char* name, const Tensor& t, const Ints& sizes, ScalarType type,
                         int32_t device) {
  require_dense(op, name, t, device);
  require(shape(t) == sizes, op, name, " has shape ", text(shape(t)), "; accepted is ", text(sizes));
  require(t.scalar_type() == type, op, name, " has another dtype than the call needs");
}

inline void require_launched(const char* op, const char* error) { require(error == nullptr, op, error ? error : ""); }

// PyTorch's current stream of the device, a cudaStream_t. libtorch_cuda.so, which Python loads privately, has it.
inline void* current_stream(int32_t device) {
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

// `t`, or a copy if it is a view that does not begin at a multiple of the 16 bytes the kernels read at once.
inline Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

inline SwinElement element_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kSwinFloat32;
    case ScalarType::BFloat16: return kSwinBFloat16;
    case ScalarType::Half: return kSwinFloat16;
    default: require(false, op, name, " has a dtype that is not float32, bfloat16 or float16");
  }
  return kSwinFloat32;
}

}  // namespace swin_torch
