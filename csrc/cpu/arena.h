// Pieces of a thread's scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/vec.h"

namespace swin {
namespace SWIN_ISA {

SWIN_ALWAYS_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Hands out consecutive pieces of one allocation, each beginning at a cache line. With a base of 0 it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)), next_(base_) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  size_t used() const { return next_ - base_; }

 private:
  uintptr_t base_, next_;
};

}  // namespace SWIN_ISA
}  // namespace swin
