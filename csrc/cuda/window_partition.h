// The launchers of window partition and reverse; elements.h says what holds for all.
#pragma once

#include <cstdint>

#include "geometry.h"

extern "C" {

// Pad, shift and partition: volume (B, *S, channels) to windows (B * windows, n, channels), padding zero; and back.
struct SwinPartition {
  int64_t element_bytes;  // 1, 2, 4, 8 or 16
  int64_t batch;
  int64_t channels;
  swin::WindowGrid grid;
};

const char* swin_cuda_window_partition(const SwinPartition* call, const void* volume, void* windows, void* stream);
const char* swin_cuda_window_reverse(const SwinPartition* call, const void* windows, void* volume, void* stream);
}
