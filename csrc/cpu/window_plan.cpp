#include "cpu/window_plan.h"

#include <algorithm>
#include <numeric>

namespace swin {
namespace {

// Bit `axis` is set where the window meets the seam of that axis.
int seam_pattern(const WindowGrid& g, int64_t window) {
  int64_t index[kAxes];
  decode(window, g.counts, index);
  int bits = 0;
  for (int axis = 0; axis < kAxes; ++axis) bits |= has_seam(g, axis, index[axis]) << axis;
  return bits;
}

}  // namespace

WindowPlan::WindowPlan(const WindowGrid& g, bool any) : grid(g), tokens(product(g.window)) {
  padded_tokens = (tokens + kTokenAlignment - 1) / kTokenAlignment * kTokenAlignment;
  const int64_t window_count = any ? product(g.counts) : 0;

  std::vector<int32_t> by_pattern[1 << kAxes];
  for (int64_t w = 0; w < window_count; ++w) by_pattern[seam_pattern(g, w)].push_back(static_cast<int32_t>(w));

  for (const std::vector<int32_t>& members : by_pattern) {
    if (members.empty()) continue;
    int64_t index[kAxes];
    decode(members.front(), g.counts, index);

    std::vector<int32_t> region(tokens), order(tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t local[kAxes];
      decode(t, g.window, local);
      region[t] = 0;
      for (int axis = 0; axis < kAxes; ++axis)
        region[t] = region[t] * 3 + region_along(g, axis, index[axis], local[axis]);
    }
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return region[a] < region[b]; });

    std::vector<int32_t> locals[kAxes], rasters(tokens), runs;
    for (std::vector<int32_t>& l : locals) l.resize(tokens);
    WindowPattern pattern{};
    for (int64_t i = 0; i < tokens; ++i) {
      int64_t local[kAxes];
      decode(order[i], g.window, local);
      for (int axis = 0; axis < kAxes; ++axis) locals[axis][i] = static_cast<int32_t>(local[axis]);
      rasters[i] = static_cast<int32_t>(bias_raster(g, order[i]));
      const bool new_region = i == 0 || region[order[i]] != region[order[i - 1]];
      if (new_region) {
        pattern.region_begin[pattern.region_count] = static_cast<int32_t>(i);
        pattern.run_begin[pattern.region_count++] = static_cast<int32_t>(runs.size());
      }
      if (new_region || rasters[i] != rasters[i - 1] + 1) runs.push_back(static_cast<int32_t>(i));
    }
    pattern.region_begin[pattern.region_count] = static_cast<int32_t>(tokens);
    pattern.run_begin[pattern.region_count] = static_cast<int32_t>(runs.size());
    runs.push_back(static_cast<int32_t>(tokens));

    const auto keep = [this](std::vector<int32_t>& v) { return storage.emplace_back(std::move(v)).data(); };
    pattern.run_token = keep(runs);
    pattern.raster = keep(order);
    for (int axis = 0; axis < kAxes; ++axis) pattern.local[axis] = keep(locals[axis]);
    pattern.bias_raster = keep(rasters);
    pattern.window_begin = static_cast<int64_t>(windows.size());
    windows.insert(windows.end(), members.begin(), members.end());
    pattern.window_end = static_cast<int64_t>(windows.size());
    patterns.push_back(pattern);
  }
}

}  // namespace swin
