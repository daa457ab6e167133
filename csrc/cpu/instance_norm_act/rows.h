// Rows of channels, block by block, as both directions of instance_norm_act go through them.
#pragma once

#include "cpu/instance_norm_act/kernels.h"
#include "cpu/storage.h"

namespace swin {
namespace SWIN_ISA {
namespace instance_norm_act {

// Rows of stored elements in arithmetic precision; read in place if they are stored in it.
template <class T>
class RowReader {
 public:
  RowReader(const void* from, ElementType type, int64_t channels, T* scratch)
      : from_(from), type_(type), channels_(channels), scratch_(scratch) {}

  const T* rows(int64_t first, int64_t count) const {
    const void* stored = at(from_, type_, first * channels_);
    if (element_bytes(type_) == sizeof(T)) return static_cast<const T*>(stored);
    load_row(stored, type_, count * channels_, scratch_);
    return scratch_;
  }

 private:
  const void* from_;
  ElementType type_;
  int64_t channels_;
  T* scratch_;
};

// The same for rows to be written: fill what rows() returns, then call store() with the same arguments.
template <class T>
class RowWriter {
 public:
  RowWriter(void* to, ElementType type, int64_t channels, T* scratch)
      : to_(to), type_(type), channels_(channels), scratch_(scratch) {}

  T* rows(int64_t first) const {
    return element_bytes(type_) == sizeof(T) ? static_cast<T*>(at(to_, type_, first * channels_)) : scratch_;
  }
  void store(int64_t first, int64_t count) const {
    if (element_bytes(type_) != sizeof(T))
      store_row(scratch_, T(1), type_, count * channels_, at(to_, type_, first * channels_));
  }

 private:
  void* to_;
  ElementType type_;
  int64_t channels_;
  T* scratch_;
};

// A block of voxels of one instance, as rows of the whole batch.
struct VoxelBlock {
  int64_t instance, first, count;
};

SWIN_ALWAYS_INLINE VoxelBlock voxel_block(const NormCall& call, int64_t index) {
  const int64_t instance = index / call.blocks, begin = index % call.blocks * call.block_voxels;
  const int64_t left = call.voxels - begin;
  return {instance, instance * call.voxels + begin, left < call.block_voxels ? left : call.block_voxels};
}

template <class T>
SWIN_ALWAYS_INLINE void zero(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

template <class T>
SWIN_ALWAYS_INLINE void add(const T* from, int64_t count, T* to) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Calls visit(first row, rows) for pieces of a block that the scratch rows hold. Sums are taken over each piece and
// then over pieces: short sums lose few digits.
template <class Visit>
SWIN_ALWAYS_INLINE void for_each_piece(const VoxelBlock& block, const Visit& visit) {
  for (int64_t done = 0; done < block.count; done += kNormScratchRows) {
    const int64_t left = block.count - done;
    visit(block.first + done, left < kNormScratchRows ? left : kNormScratchRows);
  }
}

}  // namespace instance_norm_act
}  // namespace SWIN_ISA
}  // namespace swin
