// The kernel that both directions of window attention begin with: where the tokens of each window lie.
#pragma once

#include "cuda/windows.h"

namespace swin {
namespace {

__global__ void __launch_bounds__(256) find_tokens(const Windows call) {
  const int64_t thread = thread_of_grid();
  if (thread >= static_cast<int64_t>(call.windows_a_volume) * call.padded) return;
  const int64_t window = thread / call.padded, t = thread % call.padded;
  int64_t place[kAxes], local[kAxes];
  decode(window, call.grid.counts, place);
  decode(t, call.grid.window, local);
  int64_t token = 0;
  uint32_t region = 0;
  bool real = true;
  uint32_t flags = 0;
  SWIN_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) {
    const int64_t position = natural_position(call.grid, axis, place[axis], local[axis]);
    real = real && position >= 0;
    token = token * call.grid.spatial[axis] + position;
    region = region * 3 + static_cast<uint32_t>(region_along(call.grid, axis, place[axis], local[axis]));
    if (t != 0) continue;
    if (has_seam(call.grid, axis, place[axis])) flags |= kSeam;
    for (int64_t i = 0; i < call.grid.window[axis]; ++i) {
      if (natural_position(call.grid, axis, place[axis], i) < 0) flags |= kPadded;
    }
  }
  const uint32_t where = t >= call.n ? kAbsent : real ? static_cast<uint32_t>(token) : kPadding;
  call.tokens[thread] = make_uint2(where, region);
  if (t == 0) call.flags[window] = flags;
  if (window == 0) call.rasters[t] = t < call.n ? static_cast<int>(bias_raster(call.grid, t)) : 0;
}

}  // namespace
}  // namespace swin
