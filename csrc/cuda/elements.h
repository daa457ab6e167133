// Element types of tensors, and what holds for all launchers: plain C functions on plain structs, no torch, no CUDA
// types.
//
// Every function that launches returns nullptr, or a text (valid for the life of the process) that says what is wrong;
// it then launched nothing. Nothing is allocated and, unless launches are traced, nothing waits for the GPU: the caller
// brings all memory, which must stay alive until `stream` has passed the call. All pointers are device pointers on the
// current device, tensors are contiguous and begin at a multiple of 16 bytes.
#pragma once

#include <cstdint>

enum SwinElement : int32_t { kSwinFloat32 = 0, kSwinBFloat16 = 1, kSwinFloat16 = 2 };
