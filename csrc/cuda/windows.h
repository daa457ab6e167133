// What the forward and the backward of window attention share: the windows of a call, the bias of every pair of
// tokens in the form that tensor cores take, and how a block loads the rows of a head into shared memory.
#pragma once

#include <initializer_list>
#include <string>

#include "cuda/diagnostics.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/window_attention.h"

namespace swin {

// What every kernel of a call knows.
struct Windows {
  WindowGrid grid;
  int64_t volume_tokens;  // of one volume of the batch
  int windows_a_volume, windows, heads, head_dim;
  int n, padded;     // tokens of a window, and rounded up
  bool float_table;  // bias_table is float32 while the tensors are 16-bit
  float scale;
  const void *qkv, *bias_table, *pad_qkv;

  // Workspace
  uint2* tokens;    // (windows_a_volume, padded): index in the volume, and region
  uint32_t* flags;  // (windows_a_volume): kSeam and kPadded
  int* rasters;     // (padded): bias_raster of a token
};

namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kMask = static_cast<float>(kMaskValue);
constexpr int kTile = 16;  // rows and columns of a tile of scores, as mma.sync cuts them

// Instead of the index of a token in the volume:
constexpr uint32_t kPadding = 0xfffffffeu;  // a padding token
constexpr uint32_t kAbsent = 0xffffffffu;   // beyond the window

constexpr uint32_t kSeam = 1, kPadded = 2;  // a window holds tokens of two regions; holds padding tokens

SWIN_DEVICE uint32_t channels_of(const Windows& call) { return static_cast<uint32_t>(call.heads * call.head_dim); }

SWIN_DEVICE int64_t thread_of_grid() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// The tokens of a window, and where its volume begins in the batch.
struct Window {
  const uint2* tokens;
  int64_t first;
  int within;  // its volume
  bool seam, padded;
};

SWIN_DEVICE Window window_in(const Windows& call, int64_t first, int within) {
  Window found;
  found.tokens = call.tokens + static_cast<int64_t>(within) * call.padded;
  found.first = first, found.within = within;
  found.seam = (call.flags[within] & kSeam) != 0, found.padded = (call.flags[within] & kPadded) != 0;
  return found;
}

SWIN_DEVICE Window window_at(const Windows& call, int window) {
  const int volume = window / call.windows_a_volume;
  return window_in(call, volume * call.volume_tokens, window - volume * call.windows_a_volume);
}

// The window `by` windows behind `window`, without window_at's division.
SWIN_DEVICE Window window_behind(const Windows& call, const Window& window, int by) {
  int64_t first = window.first;
  int within = window.within + by;
  for (; within >= call.windows_a_volume; within -= call.windows_a_volume) first += call.volume_tokens;
  return window_in(call, first, within);
}

// ---- bias ----------------------------------------------------------------------------------------------------------

// The bias of two tokens by their rasters.
template <class T>
SWIN_DEVICE float bias_of(const Windows& call, int head, int query_raster, int key_raster) {
  const int64_t entry = query_raster - key_raster + static_cast<int>(bias_origin(call.grid));
  const int64_t at = entry * call.heads + head;
  return call.float_table ? static_cast<const float*>(call.bias_table)[at]
                          : to_float(static_cast<const T*>(call.bias_table)[at]);
}

// A thread's part of the tile of biases at `row_tile`, `column_tile` of a head, as float16 and in the order in which
// the threads of a warp hold the left factor of an mma: one access of 16 bytes per thread. Rows are queries and columns
// keys, or with `keys_down` the other way round. Zero beyond the window.
template <class T>
SWIN_DEVICE uint4 bias_tile(const Windows& call, int head, int row_tile, int column_tile, bool keys_down) {
  uint32_t words[4];
  SWIN_UNROLL
  for (int word = 0; word < 4; ++word) {
    const int row = row_tile * kTile + lane_index() / 4 + word % 2 * 8;
    float value[2] = {};
    SWIN_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int column = column_tile * kTile + word / 2 * 8 + lane_index() % 4 * 2 + i;
      if (row >= call.n || column >= call.n) continue;
      const int down = call.rasters[row], across = call.rasters[column];
      value[i] = bias_of<T>(call, head, keys_down ? across : down, keys_down ? down : across);
      // A bias beyond the range of float16 stays finite, because it is also multiplied by the zeros off the diagonal.
      // That is as good as minus infinity; plus infinity makes a row NaN, as it does without a tile.
      if (value[i] < -65504.0f) value[i] = -65504.0f;
      if (value[i] > 65504.0f) value[i] = value[i] < kInfinity ? 65504.0f : value[i] - value[i];
    }
    words[word] = pack<Float16>(value[0], value[1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// The factor that makes a tile of biases an addend of q.k: half of a diagonal matrix of 1/scale, as a right factor.
// Unless scale is a power of two, float16 leaves a remainder of 1/scale: that is a second diagonal.
struct Diagonal {
  uint32_t most, rest;
  bool exact;  // there is no remainder
};

SWIN_DEVICE Diagonal diagonal_of(float inverse_scale) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  const float rest = inverse_scale - to_float(from_float<Float16>(inverse_scale));
  Diagonal diagonal;
  diagonal.most = pack<Float16>(2 * t == g ? inverse_scale : 0.0f, 2 * t + 1 == g ? inverse_scale : 0.0f);
  diagonal.rest = pack<Float16>(2 * t == g ? rest : 0.0f, 2 * t + 1 == g ? rest : 0.0f);
  diagonal.exact = rest == 0;
  return diagonal;
}

// scores += tile * diagonal, by halves of the columns.
SWIN_DEVICE void add_bias(float (&scores)[2][4], const uint4& tile, uint32_t diagonal) {
  const uint32_t bias[2][2] = {{tile.x, tile.y}, {tile.z, tile.w}};
  SWIN_UNROLL
  for (int half = 0; half < 2; ++half) mma_m16n8k8<Float16>(scores[half], bias[half], diagonal, scores[half]);
}

// The sum over the four lanes that share a row of scores.
SWIN_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// ---- rows of a head in shared memory, 16-bit -----------------------------------------------------------------------

// How D channels lie in shared memory and are cut into fragments.
template <int D>
struct Cut {
  static constexpr int kDepth = D < kTile ? kTile : D;  // channels in shared memory: an mma multiplies at least 16
  static constexpr int kStride = kDepth + 8;  // elements from row to row: ldmatrix finds 8 rows in different banks
  static constexpr int kSteps = kDepth / kTile;
  static constexpr int kColumns = D / 8;             // of an mma that has channels in columns
  static constexpr int kPairs = (kColumns + 1) / 2;  // ldmatrix loads two at a time
};

// Where a lane points ldmatrix_x4 to, from the first element of a 16 x 16 tile: the four 8 x 8 matrices in the order
// (rows 0-7, 8-15 of columns 0-7, then of columns 8-15), and in the order (columns 0-7, 8-15 of rows 0-7, then of rows
// 8-15). The first gives an A fragment, and transposed the B fragments of two column blocks; the second the B fragments
// of two column blocks that lie in rows, and transposed an A fragment.
SWIN_DEVICE int down_first(int lane, int stride) { return lane % 16 * stride + lane / 16 * 8; }
SWIN_DEVICE int across_first(int lane, int stride) { return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8; }

// What a thread loads of every `step`-th row, beginning at `row`: always the same 16 bytes, which lie at `offset` from
// the rows it begins at. Channels beyond D are zero.
template <int D>
struct Share {
  int row, step, offset, column;
  bool inside;  // whether the bytes are of the D channels
};

template <int D>
SWIN_DEVICE Share<D> own_share() {
  constexpr int kPieces = Cut<D>::kDepth / 8;
  Share<D> share;
  share.column = static_cast<int>(threadIdx.x) % kPieces * 8, share.inside = share.column < D;
  share.row = static_cast<int>(threadIdx.x) / kPieces, share.step = static_cast<int>(blockDim.x) / kPieces;
  share.offset = kept(share.row * Cut<D>::kStride + share.column);
  return share;
}

// Starts to copy k and v of the tokens [first, end) of a window. A padding token has pad_qkv, or zeros; rows beyond the
// window are zeros.
template <class T, int D>
SWIN_DEVICE void stage_keys(const Windows& call, const Share<D>& share, const Window& window, int head, int first,
                            int end, T* k_rows, T* v_rows) {
  const uint32_t channels = static_cast<uint32_t>(call.heads * D), token_stride = 3 * channels;
  const bool has_pad = call.pad_qkv != nullptr;
  const int own = head * D + share.column;
  const T* const source = static_cast<const T*>(call.qkv) + window.first * token_stride + own;
  const T* const pad = has_pad ? static_cast<const T*>(call.pad_qkv) + own : source;
  k_rows += share.offset, v_rows += share.offset;
  SWIN_NO_UNROLL
  for (int row = first + share.row; row < end; row += share.step) {
    const uint32_t token = row < call.padded ? window.tokens[row].x : kAbsent;
    const bool real = token < kPadding, valid = (real || (token == kPadding && has_pad)) && share.inside;
    const T* const from = (real ? source : pad) + uint64_t{real ? token : 0} * token_stride;
    cp_async_16(k_rows, from + channels, valid);
    cp_async_16(v_rows, from + 2 * channels, valid);
    k_rows += share.step * Cut<D>::kStride, v_rows += share.step * Cut<D>::kStride;
  }
}

// The same for one row per token of `rows`, which has `token_stride` elements per token; zeros for padding.
template <class T, int D>
SWIN_DEVICE void stage_queries(const Share<D>& share, const Window& window, int head, int first, int end,
                               const void* rows, uint32_t token_stride, T* to) {
  const T* const source = static_cast<const T*>(rows) + window.first * token_stride + head * D + share.column;
  to += share.offset;
  SWIN_NO_UNROLL
  for (int row = first + share.row; row < end; row += share.step) {
    const uint32_t token = window.tokens[row].x;
    const bool valid = token < kPadding && share.inside;
    cp_async_16(to, source + uint64_t{valid ? token : 0} * token_stride, valid);
    to += share.step * Cut<D>::kStride;
  }
}

// ---- host ----------------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

inline LaunchGrid blocks_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  LaunchGrid grid;
  grid.x = x, grid.y = y, grid.z = z;
  return grid;
}

// The head_dim of a call as a template argument.
template <class Function>
const char* with_head_dim(int64_t head_dim, const Function& function) {
  switch (head_dim) {
    case 8: return function.template operator()<8>();
    case 16: return function.template operator()<16>();
    case 32: return function.template operator()<32>();
    case 64: return function.template operator()<64>();
    default: return "the CUDA kernels have head_dim 8, 16, 32 and 64";
  }
}

// Reads what both directions need from the device and from a call, whose windows are rounded up to a multiple of
// `rounding` tokens. Returns nullptr, or why the kernels cannot run.
inline const char* read_call(const SwinAttention& attention, int rounding, DeviceLimits* limits, Windows* call) {
  if (const char* error = device_limits(limits)) return error;
  if (limits->compute_capability < 80) return "the CUDA kernels need compute capability 8.0";
  const int64_t n = product(attention.grid.window), windows_a_volume = product(attention.grid.counts);
  const double magnitude = attention.scale < 0 ? -attention.scale : attention.scale;
  if (n > 4096) return "the CUDA kernels are for windows of at most 4096 tokens";
  if (product(attention.grid.spatial) >= kPadding) return "a volume of 2^32 - 2 tokens or more";
  if (attention.batch > INT32_MAX / 64 / windows_a_volume) return "more than 2^25 windows";
  if (attention.heads > 65535) return "more than 65535 heads";
  if (bias_table_length(attention.grid) > INT32_MAX / 2) return "a bias table of more than 2^30 rows";
  if (attention.element != kSwinFloat32 && !(magnitude >= 0x1p-14 && magnitude <= 0x1p14)) {
    return "in 16 bits the CUDA kernels need a scale of magnitude 2^-14 to 2^14";  // 1/scale is a float16
  }
  call->grid = attention.grid;
  call->volume_tokens = product(attention.grid.spatial);
  call->windows_a_volume = static_cast<int>(windows_a_volume);
  call->windows = static_cast<int>(attention.batch * windows_a_volume);
  call->heads = static_cast<int>(attention.heads), call->head_dim = static_cast<int>(attention.head_dim);
  call->n = static_cast<int>(n), call->padded = static_cast<int>(divide_up(n, rounding)) * rounding;
  call->float_table = attention.bias_element == kSwinFloat32;
  call->scale = static_cast<float>(attention.scale);
  return nullptr;
}

// A quantity of the cut that overrides the choice of the kernels, 0 for none, and what a call accepts besides 0.
struct Asked {
  const char* name;
  int64_t value, least, most;
};

inline const char* refusal(const std::string& why) {
  return lasting_text("the override of the cut does not fit this call: " + why);
}

// Why one of `quantities` is out of its range, or nullptr.
inline const char* out_of_range(std::initializer_list<Asked> quantities) {
  for (const Asked& one : quantities) {
    if (one.value == 0 || (one.value >= one.least && one.value <= one.most)) continue;
    return refusal(one.name + (" is " + std::to_string(one.value)) + ", accepted are " + std::to_string(one.least) +
                   " to " + std::to_string(one.most));
  }
  return nullptr;
}

// The quantities that are not left to the kernels, as in "warps 4, chunks 2".
inline std::string text_of(std::initializer_list<Asked> quantities) {
  std::string text;
  for (const Asked& one : quantities) {
    if (one.value != 0) text += (text.empty() ? "" : ", ") + (one.name + (" " + std::to_string(one.value)));
  }
  return text;
}

constexpr char kFloatHasNoCut[] = "cuts are for 16-bit tensors: with those of this call, float32, there is no choice";

// Hands out pieces of the workspace, each at a multiple of 256 bytes; with a null base it only adds up.
struct Carver {
  unsigned char* base;
  int64_t used = 0;
  template <class P>
  void take(P** pointer, int64_t count) {
    *pointer = reinterpret_cast<P*>(base == nullptr ? nullptr : base + used);
    used += divide_up(count * static_cast<int64_t>(sizeof(P)), 256) * 256;
  }
  void take_tokens(Windows* call) {
    take(&call->tokens, int64_t{call->windows_a_volume} * call->padded);
    take(&call->flags, call->windows_a_volume);
    take(&call->rasters, call->padded);
  }
};

}  // namespace
}  // namespace swin
