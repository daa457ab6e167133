// What calls of all operators' kernels are made of: plain types, no torch, no standard containers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace swin {

enum class ElementType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Work is handed out one item at a time; which thread takes an item never changes a result.
using WorkCounter = std::atomic<int64_t>;

}  // namespace swin
