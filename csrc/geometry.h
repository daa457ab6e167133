// Where windows lie in a volume: the one C++ definition of window arithmetic, for host and device.
// Twin of swin_kernels/geometry.py, whose docstring gives the rules; tests/test_geometry.py compares
// the two. Clipping of window and shift is done by the caller (WindowGrid.of).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SWIN_INLINE static __host__ __device__ __forceinline__
#else
#define SWIN_INLINE static inline  // static: builds for different vector widths must not share a copy
#endif

namespace swin {

constexpr double kMaskValue = -100.0;  // added to the score of two tokens of different regions
constexpr int kAxes = 3;               // 2D volumes carry a leading axis of extent 1

// The windows of one volume; every array has one entry per axis.
struct WindowGrid {
  int64_t spatial[kAxes];  // extents in tokens
  int64_t nominal[kAxes];  // the window asked for: fixes the relative position bias
  int64_t window[kAxes];   // the window used, clipped to the axis
  int64_t shift[kAxes];    // the cyclic shift used, 0 on clipped axes
  int64_t counts[kAxes];   // windows per axis
};

SWIN_INLINE int64_t product(const int64_t (&v)[kAxes]) { return v[0] * v[1] * v[2]; }

SWIN_INLINE WindowGrid make_grid(int rank, const int64_t* spatial, const int64_t* nominal, const int64_t* window,
                                 const int64_t* shift) {
  WindowGrid g;
  for (int axis = 0; axis < kAxes; ++axis) {
    const int from = axis - (kAxes - rank);
    g.spatial[axis] = from < 0 ? 1 : spatial[from];
    g.nominal[axis] = from < 0 ? 1 : nominal[from];
    g.window[axis] = from < 0 ? 1 : window[from];
    g.shift[axis] = from < 0 ? 0 : shift[from];
    g.counts[axis] = (g.spatial[axis] + g.window[axis] - 1) / g.window[axis];
  }
  return g;
}

// Row-major decoding of `index` in a grid of `extents`.
SWIN_INLINE void decode(int64_t index, const int64_t (&extents)[kAxes], int64_t (&coordinates)[kAxes]) {
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    coordinates[axis] = index % extents[axis];
    index /= extents[axis];
  }
}

// Natural position along `axis` of place `local` in window `index` of that axis, or -1 in the padding.
SWIN_INLINE int64_t natural_position(const WindowGrid& g, int axis, int64_t index, int64_t local) {
  const int64_t padded = g.counts[axis] * g.window[axis];
  int64_t position = index * g.window[axis] + local + g.shift[axis];
  if (position >= padded) position -= padded;
  return position < g.spatial[axis] ? position : -1;
}

// Whether window `index` of `axis` holds tokens of two regions, as the last window of a shifted axis does.
SWIN_INLINE bool has_seam(const WindowGrid& g, int axis, int64_t index) {
  return g.shift[axis] > 0 && index == g.counts[axis] - 1;
}

// Region along `axis`; cut at padded - window and padded - shift on a shifted axis.
SWIN_INLINE int region_along(const WindowGrid& g, int axis, int64_t index, int64_t local) {
  if (g.shift[axis] == 0) return 0;
  const bool last = index == g.counts[axis] - 1;
  return last + (last && local >= g.window[axis] - g.shift[axis]);
}

// Place of window token `t` in an array of extents 2w - 1, decoded in the nominal window's raster.
SWIN_INLINE int64_t bias_raster(const WindowGrid& g, int64_t t) {
  int64_t c[kAxes];
  decode(t, g.nominal, c);
  return (c[0] * (2 * g.nominal[1] - 1) + c[1]) * (2 * g.nominal[2] - 1) + c[2];
}

// Row of the bias table for (query, key) is bias_raster(query) - bias_raster(key) + bias_origin.
SWIN_INLINE int64_t bias_origin(const WindowGrid& g) { return bias_raster(g, product(g.nominal) - 1); }

SWIN_INLINE int64_t bias_table_length(const WindowGrid& g) {
  return (2 * g.nominal[0] - 1) * (2 * g.nominal[1] - 1) * (2 * g.nominal[2] - 1);
}

// Attention dropout: a counter-based hash, see geometry.py.
constexpr uint32_t kGolden = 0x9E3779B9u;

SWIN_INLINE uint32_t mix32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = (x ^ (x >> 15)) * 0x846CA68Bu;
  return x ^ (x >> 16);
}

SWIN_INLINE uint32_t dropout_row_hash(int64_t seed, int64_t row) {
  const uint64_t s = static_cast<uint64_t>(seed), r = static_cast<uint64_t>(row);
  return mix32(mix32(static_cast<uint32_t>(r) ^ static_cast<uint32_t>(s)) + static_cast<uint32_t>(r >> 32) +
               static_cast<uint32_t>(s >> 32));
}

SWIN_INLINE bool dropout_keep(uint32_t row_hash, uint32_t key, uint32_t threshold) {
  return mix32(row_hash + key * kGolden) >= threshold;
}

SWIN_INLINE uint32_t dropout_threshold(double probability) {
  const double t = probability * 4294967296.0;
  return t >= 4294967295.0 ? 0xFFFFFFFFu : static_cast<uint32_t>(t);
}

}  // namespace swin
