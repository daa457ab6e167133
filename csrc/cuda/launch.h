// What host code needs from the CUDA runtime: what the current device offers, and how to start a kernel.
// tests/cuda/emulation/cuda/launch.h has the same functions for the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "cuda/diagnostics.h"

namespace swin {

// What decides how a kernel is cut.
struct DeviceLimits {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;     // of the device
  int shared_per_block;    // bytes of dynamic shared memory that a block may ask for
  int shared_per_multiprocessor;
};

// Fills `limits` for the current device. Returns nullptr, or what went wrong.
inline const char* device_limits(DeviceLimits* limits) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](cudaDeviceAttr attribute, int* value) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  ask(cudaDevAttrComputeCapabilityMajor, &major);
  ask(cudaDevAttrComputeCapabilityMinor, &minor);
  ask(cudaDevAttrMultiProcessorCount, &limits->multiprocessors);
  ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limits->shared_per_block);
  ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &limits->shared_per_multiprocessor);
  limits->compute_capability = 10 * major + minor;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

struct LaunchGrid {
  int64_t x = 1, y = 1, z = 1;
};

inline std::string kernel_name(const void* function) {
#if CUDART_VERSION >= 12030
  const char* mangled = nullptr;
  if (cudaFuncGetName(&mangled, function) == cudaSuccess) return readable_kernel_name(mangled);
#endif
  return "a kernel without a name";
}

// Waits until all of `stream` is done, unless it is being captured: nothing runs then, and a wait would end the
// capture.
inline cudaError_t wait(cudaStream_t stream) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(stream, &capture);
  return error != cudaSuccess || capture != cudaStreamCaptureStatusNone ? error : cudaStreamSynchronize(stream);
}

// Starts `kernel` on `stream` (a cudaStream_t). Returns nullptr, or what went wrong; nothing ran then. If launches are
// traced, the kernel may also have run and failed.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), LaunchGrid grid, int threads, int64_t shared_bytes, void* stream,
                   Arguments... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument a parameter");
  if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return "launch: the grid of blocks is empty or beyond CUDA's limits of 2^31 - 1, 65535, 65535";
  }
  const auto function = reinterpret_cast<const void*>(kernel);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  const auto on = static_cast<cudaStream_t>(stream);
  const auto start = [&](Parameters... converted) {
    if (shared_bytes > 48 * 1024) {  // more must be requested
      const cudaError_t error =
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
      if (error != cudaSuccess) return error;
    }
    void* pointers[] = {&converted...};
    return cudaLaunchKernel(function, blocks, dim3(static_cast<unsigned>(threads)), pointers,
                            static_cast<size_t>(shared_bytes), on);
  };
  const bool trace = is_traced();
  const auto run = [&]() -> const char* {
    cudaError_t error = start(arguments...);
    if (error == cudaSuccess && trace) error = wait(on);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  };
  return trace ? traced(kernel_name(function), run) : run();
}

}  // namespace swin
