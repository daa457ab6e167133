// Memory for the kernels: tensors whose fresh memory costs few page faults, and buffers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "torch/checks.h"

namespace swin_torch {

// An uninitialised tensor. The first write to each 4 KiB page of fresh memory interrupts the program, which for the
// volumes of the decoder takes as long as computing them; the system is asked for pages of 2 MiB instead. This is
// advice: if the system ignores it, only the time changes.
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

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

inline Buffer allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

}  // namespace swin_torch
