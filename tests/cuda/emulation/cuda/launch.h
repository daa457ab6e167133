// Stands in for csrc/cuda/launch.h where kernels are compiled for the CPU.
#pragma once

#include <cstdint>
#include <cstdio>
#include <tuple>

#include "../emulator.h"
#include "cuda/diagnostics.h"

namespace swin {

using DeviceLimits = emulation::Device;
inline const char* device_limits(DeviceLimits* limits) {
  *limits = emulation::device;
  return nullptr;
}

struct LaunchGrid {
  int64_t x = 1, y = 1, z = 1;
};

// Its address in the emulation's file: functions without external linkage have no name that could be found here.
inline std::string kernel_name(const void* kernel) {
  char name[32];
  std::snprintf(name, sizeof name, "0x%llx", static_cast<unsigned long long>(emulation::address_in_file(kernel)));
  return name;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), LaunchGrid grid, int threads, int64_t shared_bytes, void* /*stream*/,
                   Arguments... arguments) {
  if (grid.x < 1 || grid.x > INT32_MAX || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    return "launch: the grid of blocks is empty or beyond CUDA's limits of 2^31 - 1, 65535, 65535";
  }
  const std::tuple<Parameters...> converted(arguments...);
  const emulation::Dim blocks{static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                              static_cast<unsigned>(grid.z)};
  const emulation::Launch launch{reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes};
  const auto run = [&] { return emulation::run(launch, [&] { std::apply(kernel, converted); }); };
  return is_traced() ? traced(kernel_name(launch.kernel), run) : run();
}

}  // namespace swin
