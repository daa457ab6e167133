// What the registrations of both devices check: errors that name argument, value and what is accepted.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "geometry.h"

namespace swin_torch {

using Ints = std::vector<int64_t>;

template <class... Parts>
void require(bool condition, const char* op, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(const Ints& v) {
  std::ostringstream s;
  s << "(";
  for (size_t i = 0; i < v.size(); ++i) s << (i ? ", " : "") << v[i];
  s << ")";
  return s.str();
}

inline Ints shape(const torch::stable::Tensor& t) {
  Ints sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return sizes;
}

// More tokens than any memory holds; below it no product of extents overflows.
constexpr int64_t kLargestVolume = int64_t{1} << 40;

inline swin::WindowGrid grid_of(const char* op, const Ints& spatial, const Ints& nominal, const Ints& window,
                                const Ints& shift) {
  const size_t rank = spatial.size();
  require(rank == 2 || rank == 3, op, "spatial extents are ", text(spatial), "; accepted are 2 or 3");
  require(nominal.size() == rank && window.size() == rank && shift.size() == rank, op, "window_size ", text(window),
          " and shift_size ", text(shift), " must have one entry for each of ", rank, " axes");
  int64_t padded_volume = 1, nominal_volume = 1;
  for (size_t i = 0; i < rank; ++i) {
    require(spatial[i] >= 1 && spatial[i] <= kLargestVolume, op, "spatial extents are ", text(spatial),
            "; each must be at least 1 and at most ", kLargestVolume);
    require(window[i] >= 1 && window[i] <= spatial[i] && window[i] <= nominal[i], op, "window_size is ", text(window),
            "; each entry must be at least 1 and at most the nominal window and the extent of ", text(spatial));
    require(shift[i] >= 0 && shift[i] < window[i], op, "shift_size is ", text(shift),
            "; each entry must be at least 0 and below window_size ", text(window));
    const int64_t padded = (spatial[i] + window[i] - 1) / window[i] * window[i];
    require(padded <= kLargestVolume / padded_volume, op, "spatial extents ", text(spatial),
            " hold more tokens than the ", kLargestVolume, " accepted");
    require(nominal[i] <= kLargestVolume / 8 / nominal_volume, op, "window_size ", text(nominal), " is too large");
    padded_volume *= padded;
    nominal_volume *= nominal[i];
  }
  return swin::make_grid(static_cast<int>(rank), spatial.data(), nominal.data(), window.data(), shift.data());
}

}  // namespace swin_torch
