// The launcher of the convolution; elements.h says what holds for all.
#pragma once

#include <cstdint>

#include "cuda/elements.h"
#include "geometry.h"

extern "C" {

// The 3 x 3 x 3 convolution, stride 1 and zero padding, of x and skip, as if their channels were one tensor's.
struct SwinConvolution {
  SwinElement element;  // of all tensors: bfloat16 or float16
  int64_t batch;
  int64_t spatial[swin::kAxes];
  int64_t channels, skip_channels, out_channels;  // multiples of 48; skip_channels may be 0
};

// x (B, *S, channels), skip (B, *S, skip_channels) or null, out (B, *S, out_channels); the weight by blocks of 48
// channels: (out_channels / 48, (channels + skip_channels) / 48, 27, 48 of the output, 48 of the input).
const char* swin_cuda_convolution(const SwinConvolution* call, const void* x, const void* skip, const void* weight,
                                  void* out, void* stream);
}
