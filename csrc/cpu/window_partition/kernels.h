// What the kernels of window partition take and offer. They only move bytes: one build serves every processor.
#pragma once

#include "geometry.h"

namespace swin {

struct PartitionCall {
  const WindowGrid* grid;
  int64_t token_bytes;
  const void* from;
  void* to;
};

void partition_windows(const PartitionCall&, int64_t begin, int64_t end);  // windows [begin, end)
void reverse_windows(const PartitionCall&, int64_t begin, int64_t end);

}  // namespace swin
