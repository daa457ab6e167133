// Window partition and reverse: one copy of the volume each, padding and cyclic shift by index arithmetic.
//
// Both directions walk over the windows' side of the copy token by token, in memory order, so that this side is one
// contiguous stream; on the volume's side a row of window[2] tokens is contiguous. A thread copies kInFlight
// pieces of up to 16 bytes, all read before the first is written: enough bytes on their way to fill the memory bus.
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/window_partition.h"

namespace swin {
namespace {

constexpr int kThreads = 256;  // of a block at most; the blocks of a window share it evenly
constexpr int kInFlight = 4;   // pieces of a thread: 16 KiB per block, 128 KiB per multiprocessor at full occupancy

// Where a copy reads and writes, in pieces: a token is `pieces` of them. 32-bit where only one window is concerned.
struct Copy {
  const void* source;
  void* target;
  uint32_t spatial[kAxes], window[kAxes], shift[kAxes], counts[kAxes];
  uint32_t pieces;         // of a token
  uint32_t window_pieces;  // of a window
  uint32_t window_blocks;  // blocks that copy one window
};

// The volume's side of one window.
struct Window {
  int64_t first;          // token at which its volume of the batch begins
  uint32_t begin[kAxes];  // padded position of its first token, before the shift comes back round
};

SWIN_DEVICE Window locate(const Copy& copy, uint32_t index) {
  Window window;
  SWIN_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    window.begin[axis] = index % copy.counts[axis] * copy.window[axis] + copy.shift[axis];
    index /= copy.counts[axis];
  }
  window.first = static_cast<int64_t>(index) * copy.spatial[0] * copy.spatial[1] * copy.spatial[2];
  return window;
}

// Index of the volume's token that is token `local` of the window, or -1 in the padding.
SWIN_DEVICE int64_t volume_token(const Copy& copy, const Window& window, uint32_t local) {
  const uint32_t row = local / copy.window[2], plane = row / copy.window[1];
  const uint32_t offset[kAxes] = {plane, row - plane * copy.window[1], local - row * copy.window[2]};
  int64_t token = 0;
  bool real = true;
  SWIN_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) {
    const uint32_t padded = copy.counts[axis] * copy.window[axis];
    uint32_t position = window.begin[axis] + offset[axis];
    if (position >= padded) position -= padded;
    real = real && position < copy.spatial[axis];
    token = token * copy.spatial[axis] + position;
  }
  return real ? window.first + token : -1;
}

// One block copies kInFlight pieces per thread of one window.
template <class Piece, bool kReverse>
__global__ void __launch_bounds__(kThreads) copy_windows(const Copy copy) {
  const Piece* source = static_cast<const Piece*>(copy.source);
  Piece* target = static_cast<Piece*>(copy.target);
  const uint32_t index = blockIdx.x / copy.window_blocks, block = blockIdx.x - index * copy.window_blocks;
  const int64_t first = static_cast<int64_t>(index) * copy.window_pieces;  // on the windows' side
  const Window window = locate(copy, index);
  Piece value[kInFlight] = {};
  int64_t at[kInFlight];  // on the volume's side; -1 for padding and beyond the window
  SWIN_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t piece = (block * kInFlight + i) * blockDim.x + threadIdx.x;
    const uint32_t local = piece / copy.pieces;
    const int64_t token = piece < copy.window_pieces ? volume_token(copy, window, local) : -1;
    at[i] = token < 0 ? -1 : token * copy.pieces + (piece - local * copy.pieces);
    if (token >= 0) value[i] = source[kReverse ? first + piece : at[i]];
  }
  SWIN_UNROLL
  for (int i = 0; i < kInFlight; ++i) {
    const uint32_t piece = (block * kInFlight + i) * blockDim.x + threadIdx.x;
    if (kReverse) {
      if (at[i] >= 0) target[at[i]] = value[i];
    } else if (piece < copy.window_pieces) {
      target[first + piece] = value[i];
    }
  }
}

template <class Piece, bool kReverse>
const char* start(const Copy& copy, int64_t windows, void* stream) {
  LaunchGrid blocks;
  blocks.x = windows * copy.window_blocks;
  const uint32_t lanes = 32 * kInFlight * copy.window_blocks;
  const int threads = static_cast<int>((copy.window_pieces + lanes - 1) / lanes) * 32;
  return launch(copy_windows<Piece, kReverse>, blocks, threads, 0, stream, copy);
}

template <bool kReverse>
const char* copy_all(const SwinPartition& call, const void* source, void* target, void* stream) {
  const int64_t token_bytes = call.channels * call.element_bytes;
  const int64_t windows = call.batch * product(call.grid.counts),
                window_bytes = product(call.grid.window) * token_bytes;
  if (windows == 0 || token_bytes == 0) return nullptr;
  // The widest access that divides a token and both addresses: a view may begin anywhere in its storage.
  const uint64_t steps =
      static_cast<uint64_t>(token_bytes) | reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target);
  int64_t piece_bytes = 16;
  while (steps % static_cast<uint64_t>(piece_bytes) != 0) piece_bytes /= 2;
  Copy copy{source, target, {}, {}, {}, {}, 0, 0, 0};
  const int64_t window_pieces = window_bytes / piece_bytes;
  const int64_t window_blocks = (window_pieces + kThreads * kInFlight - 1) / (kThreads * kInFlight);
  if (window_pieces > INT32_MAX / 2) return "window_partition: a window of more than 2^30 pieces of up to 16 bytes";
  if (windows > INT32_MAX / window_blocks)
    return "window_partition: more than 2^31 - 1 blocks of up to 1024 such pieces";
  for (int axis = 0; axis < kAxes; ++axis) {
    if (call.grid.spatial[axis] > INT32_MAX / 2) return "window_partition: an axis of more than 2^30 tokens";
    copy.spatial[axis] = static_cast<uint32_t>(call.grid.spatial[axis]);
    copy.window[axis] = static_cast<uint32_t>(call.grid.window[axis]);
    copy.shift[axis] = static_cast<uint32_t>(call.grid.shift[axis]);
    copy.counts[axis] = static_cast<uint32_t>(call.grid.counts[axis]);
  }
  copy.pieces = static_cast<uint32_t>(token_bytes / piece_bytes);
  copy.window_pieces = static_cast<uint32_t>(window_pieces);
  copy.window_blocks = static_cast<uint32_t>(window_blocks);
  switch (piece_bytes) {
    case 16: return start<uint4, kReverse>(copy, windows, stream);
    case 8: return start<uint2, kReverse>(copy, windows, stream);
    case 4: return start<uint32_t, kReverse>(copy, windows, stream);
    case 2: return start<uint16_t, kReverse>(copy, windows, stream);
    default: return start<uint8_t, kReverse>(copy, windows, stream);
  }
}

}  // namespace
}  // namespace swin

const char* swin_cuda_window_partition(const SwinPartition* call, const void* volume, void* windows, void* stream) {
  return swin::copy_all<false>(*call, volume, windows, stream);
}

const char* swin_cuda_window_reverse(const SwinPartition* call, const void* windows, void* volume, void* stream) {
  return swin::copy_all<true>(*call, windows, volume, stream);
}
