// Pad, cyclic shift and partition as one copy per token, and back. Bytes are moved as they are.
#include <cstring>

#include "cpu/window_partition/kernels.h"

namespace swin {
namespace {

// Calls visit(natural token over the batch or -1, token over the windows) for the tokens of windows [begin, end).
template <class Visit>
void for_each_token(const WindowGrid& g, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t windows = product(g.counts), tokens = product(g.window);
  for (int64_t w = begin; w < end; ++w) {
    int64_t index[kAxes];
    decode(w % windows, g.counts, index);
    int64_t slot = w * tokens;
    for (int64_t a = 0; a < g.window[0]; ++a) {
      const int64_t d = natural_position(g, 0, index[0], a);
      for (int64_t b = 0; b < g.window[1]; ++b) {
        const int64_t h = natural_position(g, 1, index[1], b);
        const int64_t row = ((w / windows * g.spatial[0] + d) * g.spatial[1] + h) * g.spatial[2];
        for (int64_t c = 0; c < g.window[2]; ++c, ++slot) {
          const int64_t x = natural_position(g, 2, index[2], c);
          visit(d < 0 || h < 0 || x < 0 ? -1 : row + x, slot);
        }
      }
    }
  }
}

}  // namespace

void partition_windows(const PartitionCall& call, int64_t begin, int64_t end) {
  const char* volume = static_cast<const char*>(call.from);
  char* windows = static_cast<char*>(call.to);
  const size_t bytes = static_cast<size_t>(call.token_bytes);
  for_each_token(*call.grid, begin, end, [&](int64_t token, int64_t slot) {
    char* to = windows + slot * call.token_bytes;
    if (token < 0)
      std::memset(to, 0, bytes);
    else
      std::memcpy(to, volume + token * call.token_bytes, bytes);
  });
}

void reverse_windows(const PartitionCall& call, int64_t begin, int64_t end) {
  const char* windows = static_cast<const char*>(call.from);
  char* volume = static_cast<char*>(call.to);
  const size_t bytes = static_cast<size_t>(call.token_bytes);
  for_each_token(*call.grid, begin, end, [&](int64_t token, int64_t slot) {
    if (token >= 0) std::memcpy(volume + token * call.token_bytes, windows + slot * call.token_bytes, bytes);
  });
}

}  // namespace swin
