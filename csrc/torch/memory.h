// Tensors whose fresh memory costs few page faults.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "checks.h"

namespace swin_torch {

// An uninitialised tensor. The first write to each 4 KiB page of fresh memory interrupts the program, which for the
// volumes of the decoder takes as long as computing them; the system is asked for pages of 2 MiB instead. It is advice:
// where it is not taken, nothing changes but the time.
inline torch::stable::Tensor empty_on_large_pages(const Ints& sizes, torch::headeronly::ScalarType type) {
  torch::stable::Tensor tensor = torch::stable::empty(sizes, type);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace swin_torch
