// The windows of a volume sorted by seam pattern, so that tokens that attend to each other lie together.
#pragma once

#include <cstdint>
#include <vector>

#include "geometry.h"

namespace swin {

// Windows crossed by the seams of the same axes hold the same regions in the same places: one pattern.
// Its tokens are ordered by region, and within a region by raster.
struct WindowPattern {
  int32_t region_count;
  int32_t region_begin[9];      // first token of each region, and the end
  int32_t run_begin[9];         // first run of each region, and the end
  const int32_t* run_token;     // (runs + 1) first token of each run, and the end
  const int32_t* raster;        // (n) raster of each token in the window
  const int32_t* local[kAxes];  // (n) place of each token along each axis
  const int32_t* bias_raster;   // (n) see geometry.h; consecutive within a run
  int64_t window_begin;         // its windows are plan.windows[window_begin, window_end)
  int64_t window_end;
};

struct WindowPlan {
  WindowGrid grid;
  int64_t tokens;         // in a window (n)
  int64_t padded_tokens;  // n rounded up to kTokenAlignment
  std::vector<WindowPattern> patterns;
  std::vector<int32_t> windows;  // window indices, grouped by pattern
  std::vector<std::vector<int32_t>> storage;

  // Without `any` the plan has no windows, as for an empty batch: finding them takes time for each window.
  WindowPlan(const WindowGrid& grid, bool any);
};

// Tokens are padded to whole vectors of any build, for any element type.
constexpr int64_t kTokenAlignment = 16;

}  // namespace swin
