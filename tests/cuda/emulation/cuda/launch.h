// Stands in for csrc/cuda/launch.h where kernels are compiled for the CPU.
#pragma once

#include <cstdint>
#include <tuple>

#include "../emulator.h"

namespace swin {

using DeviceLimits = emulation::Device;
inline const char* device_limits(DeviceLimits* limits) {
  *limits = emulation::device;
  return nullptr;
}

struct LaunchGrid {
  int64_t x = 1, y = 1, z = 1;
};

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), LaunchGrid grid, int threads, int64_t shared_bytes, void* /*stream*/,
                   Arguments... arguments) {
  if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return "launch: the grid of blocks is empty or beyond CUDA's limits of 2^31 - 1, 65535, 65535";
  }
  const std::tuple<Parameters...> converted(arguments...);
  const emulation::Dim blocks{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                              static_cast<unsigned>(grid.z)};
  return emulation::run({reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes},
                        [&] { std::apply(kernel, converted); });
}

}  // namespace swin
