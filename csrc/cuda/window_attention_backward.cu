// Gradients of shifted-window attention; docs/cuda.md derives the passes and their floor.
//
// With s = scale q.k + bias + mask, for every window and head:
//
//   p  = exp(s - lse)            from the stored log-sum-exp of the forward
//   dp = grad_out . v            delta = sum over channels of grad_out * out
//   ds = p (dp - delta)
//   dq = scale sum_keys ds k     dk = scale sum_queries ds q     dv = sum_queries p grad_out
//   gradient of the bias table = sum of ds over windows and over the pairs of tokens that share an entry
//
// Passes: 1. `find_tokens`, `prepare_bias`, `prepare_rows`: where tokens lie, bias tiles in the order of fragments, lse
// and delta of each query by window. 2. `differentiate_qkv`: a block owns a head and takes window after window.
// 3. `differentiate_bias`: a block owns one head and one tile of queries x keys, in all windows. 4. Sums in a fixed
// order. Passes 2 and 3 both compute p again: the n x n bias gradient of a head does not fit beside anything else on a
// multiprocessor, and writing ds to memory would cost more than the second exponential. float32 has its own kernels for
// 2 and 3, which multiply in float32 proper. Nothing is accumulated by atomics; results repeat bit by bit.
#include "cuda/launch.h"
#include "cuda/launchers.h"
#include "cuda/ptx.h"

namespace swin {
namespace {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kMask = static_cast<float>(kMaskValue);
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kLargestWindow = 1024;  // tokens: bias tiles and bias gradient are n x n
constexpr int kTile = 16;             // rows and columns of a tile of scores, as mma.sync cuts them
constexpr int kRounding = 64;         // n is rounded up to a multiple of it: the widest tile of keys

// Instead of the index of a token in the volume:
constexpr uint32_t kPadding = 0xfffffffeu;  // a padding token
constexpr uint32_t kAbsent = 0xffffffffu;   // beyond the window

// What every kernel of one call knows.
struct Call {
  WindowGrid grid;
  int64_t volume_tokens;  // of one volume of the batch
  int windows_a_volume, windows, heads, head_dim;
  int n, padded;  // tokens of a window, and rounded up
  bool float_table, has_padding;
  float scale;

  const void *grad_out, *qkv, *bias_table, *pad_qkv, *out;
  const float* lse;
  void *grad_qkv, *grad_bias_table, *grad_pad_qkv;

  // Workspace
  uint2* tokens;       // (windows_a_volume, padded): index in the volume, and region
  uint32_t* seams;     // (windows_a_volume): whether the window holds tokens of two regions
  int* rasters;        // (padded): bias_raster of a token
  uint4* tiles;        // (2, heads, padded / 16, padded / 16, pieces, 32): see BiasTile
  float2* rows;        // (windows, heads, padded): lse and -delta, see prepare_rows
  float* planes;       // (heads, parts, padded, padded): bias gradient before reduction
  float* pad_parts;    // (pad_rows, 2C): gradient of k and v of padding tokens before reduction
  float* grad_q_part;  // (windows, heads, padded, head_dim): between blocks of keys
  int parts, pad_rows;
};

SWIN_DEVICE int64_t channels_of(const Call& call) { return static_cast<int64_t>(call.heads) * call.head_dim; }

SWIN_DEVICE int64_t thread_of_grid() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <class T>
SWIN_DEVICE float load_table(const Call& call, int64_t index) {
  return call.float_table ? static_cast<const float*>(call.bias_table)[index]
                          : to_float(static_cast<const T*>(call.bias_table)[index]);
}

// Sum of the products of the elements of two 16-byte pieces.
template <class T>
SWIN_DEVICE float dot_of(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
  SWIN_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      sum = fmaf(float_of(x[i]), float_of(y[i]), sum);
    } else {
      const float2 u = unpack<T>(x[i]), v = unpack<T>(y[i]);
      sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
    }
  }
  return sum;
}

// The tokens of a window, and where its volume begins in the batch.
struct Window {
  const uint2* tokens;
  int64_t first;
  bool seam;
};

SWIN_DEVICE Window window_at(const Call& call, int window) {
  const int volume = window / call.windows_a_volume, within = window - volume * call.windows_a_volume;
  Window found;
  found.tokens = call.tokens + static_cast<int64_t>(within) * call.padded;
  found.first = volume * call.volume_tokens;
  found.seam = call.seams[within] != 0;
  return found;
}

// Starts to copy `count` tokens to rows of `row_stride` elements in shared memory: D channels of T, then zeros up to
// Columns. The source has `stride` channels a token; a padding token is read from `pad`, or zero where that is null.
template <class T, int D, int Columns>
SWIN_DEVICE void stage(T* shared, int row_stride, const uint2* tokens, int count, const T* source, int64_t stride,
                       const T* pad) {
  constexpr int kPiece = 16 / sizeof(T), kPieces = Columns / kPiece;
  for (int i = static_cast<int>(threadIdx.x); i < count * kPieces; i += static_cast<int>(blockDim.x)) {
    const int row = i / kPieces, column = i % kPieces * kPiece;
    const uint32_t token = tokens[row].x;
    const T* from = token < kPadding ? source + token * stride : token == kPadding ? pad : nullptr;
    const bool valid = from != nullptr && column < D;
    cp_async_16(shared + row * row_stride + column, valid ? from + column : source, valid);
  }
}

// The same for lse and -delta of `count` queries, an even number.
SWIN_DEVICE void stage_rows(float2* shared, const float2* rows, int count) {
  for (int i = 2 * static_cast<int>(threadIdx.x); i < count; i += 2 * static_cast<int>(blockDim.x)) {
    cp_async_16(shared + i, rows + i, true);
  }
}

// The q, k, v (part 0, 1, 2) of a head, at the first token of a volume; and of what a padding token carries.
template <class T>
SWIN_DEVICE const T* part_of(const Call& call, const Window& window, int head, int part) {
  return static_cast<const T*>(call.qkv) + window.first * 3 * channels_of(call) + part * channels_of(call) +
         head * call.head_dim;
}

template <class T>
SWIN_DEVICE const T* pad_of(const Call& call, int head, int part) {
  if (call.pad_qkv == nullptr) return nullptr;
  return static_cast<const T*>(call.pad_qkv) + part * channels_of(call) + head * call.head_dim;
}

template <class T>
SWIN_DEVICE const T* grad_of(const Call& call, const Window& window, int head) {
  return static_cast<const T*>(call.grad_out) + window.first * channels_of(call) + head * call.head_dim;
}

SWIN_DEVICE const float2* rows_of(const Call& call, int window, int head) {
  return call.rows + (static_cast<int64_t>(window) * call.heads + head) * call.padded;
}

// ---- 1. where tokens lie, bias tiles, lse and delta ----------------------------------------------------------------

__global__ void __launch_bounds__(256) find_tokens(const Call call) {
  const int64_t thread = thread_of_grid();
  if (thread >= static_cast<int64_t>(call.windows_a_volume) * call.padded) return;
  const int64_t window = thread / call.padded, t = thread % call.padded;
  int64_t place[kAxes], local[kAxes];
  decode(window, call.grid.counts, place);
  decode(t, call.grid.window, local);
  int64_t token = 0;
  uint32_t region = 0;
  bool real = true, seam = false;
  SWIN_UNROLL
  for (int axis = 0; axis < kAxes; ++axis) {
    const int64_t position = natural_position(call.grid, axis, place[axis], local[axis]);
    real = real && position >= 0;
    token = token * call.grid.spatial[axis] + position;
    region = region * 3 + static_cast<uint32_t>(region_along(call.grid, axis, place[axis], local[axis]));
    seam = seam || has_seam(call.grid, axis, place[axis]);
  }
  uint2 entry;
  entry.x = t >= call.n ? kAbsent : real ? static_cast<uint32_t>(token) : kPadding;
  entry.y = region;
  call.tokens[thread] = entry;
  if (t == 0) call.seams[window] = seam ? 1 : 0;
  if (window == 0) call.rasters[t] = t < call.n ? static_cast<int>(bias_raster(call.grid, t)) : 0;
}

// The bias of every pair of tokens, in tiles of 16 x 16 whose elements lie in the order in which the threads of a warp
// hold a tile of scores: the 8 of a thread in one or two pieces of 16 bytes. First with keys in rows and queries in
// columns, for differentiate_qkv, then with queries in rows, for differentiate_bias. A key beyond the window gets minus
// infinity, which makes its weight zero. Beside bfloat16 the tiles are float16, which rounds 8 times finer than
// bfloat16 does; beside float16 that would show, and they are float32.
template <class T>
struct BiasTile {
  static constexpr int kPieces = 1;
  uint4 piece[1];
};

template <>
struct BiasTile<Float16> {
  static constexpr int kPieces = 2;
  uint4 piece[2];
};

template <class T>
SWIN_DEVICE int64_t tile_offset(const Call& call, int orientation, int head, int row_tile, int column_tile) {
  const int64_t side = call.padded / kTile;
  const int64_t tile = ((orientation * call.heads + head) * side + row_tile) * side + column_tile;
  return tile * 32 * BiasTile<T>::kPieces + lane_index();
}

template <class T>
SWIN_DEVICE BiasTile<T> load_tile(const uint4* at) {
  BiasTile<T> tile;
  SWIN_UNROLL
  for (int i = 0; i < BiasTile<T>::kPieces; ++i) tile.piece[i] = at[32 * i];
  return tile;
}

// The eight biases of a thread, first of the left half of the tile.
template <class T>
SWIN_DEVICE void unpack_tile(const BiasTile<T>& tile, float (&bias)[2][4]) {
  SWIN_UNROLL
  for (int i = 0; i < BiasTile<T>::kPieces; ++i) {
    const uint32_t words[4] = {tile.piece[i].x, tile.piece[i].y, tile.piece[i].z, tile.piece[i].w};
    SWIN_UNROLL
    for (int j = 0; j < 4; ++j) {
      if constexpr (BiasTile<T>::kPieces == 2) {
        bias[i][j] = float_of(words[j]);
      } else {
        const float2 two = unpack<Float16>(words[j]);
        bias[j / 2][j % 2 * 2] = two.x, bias[j / 2][j % 2 * 2 + 1] = two.y;
      }
    }
  }
}

// A warp writes one tile.
template <class T>
__global__ void __launch_bounds__(256) prepare_bias(const Call call) {
  const int64_t tile = thread_of_grid() / 32;
  const int lane = lane_index(), side = call.padded / kTile;
  if (tile >= static_cast<int64_t>(2) * call.heads * side * side) return;
  const int column_tile = static_cast<int>(tile % side), row_tile = static_cast<int>(tile / side % side);
  const int head = static_cast<int>(tile / side / side % call.heads);
  const int orientation = static_cast<int>(tile / side / side / call.heads);
  const int origin = static_cast<int>(bias_origin(call.grid));
  float value[8];
  SWIN_UNROLL
  for (int i = 0; i < 8; ++i) {
    const int row = row_tile * kTile + lane / 4 + (i & 2) * 4;
    const int column = column_tile * kTile + (i & 4) * 2 + lane % 4 * 2 + (i & 1);
    const int key = orientation == 0 ? row : column, query = orientation == 0 ? column : row;
    if (key >= call.n) {
      value[i] = -kInfinity;
    } else if (query >= call.n) {
      value[i] = 0;
    } else {
      const int64_t entry = call.rasters[query] - call.rasters[key] + origin;
      value[i] = load_table<T>(call, entry * call.heads + head);
    }
  }
  uint4* at = call.tiles + tile_offset<T>(call, orientation, head, row_tile, column_tile);
  if constexpr (BiasTile<T>::kPieces == 2) {
    at[0] = make_uint4(bits_of(value[0]), bits_of(value[1]), bits_of(value[2]), bits_of(value[3]));
    at[32] = make_uint4(bits_of(value[4]), bits_of(value[5]), bits_of(value[6]), bits_of(value[7]));
  } else {
    SWIN_UNROLL
    for (int i = 0; i < 8; ++i) {  // a bias beyond the range of float16 stays finite
      if (value[i] > -kInfinity) value[i] = fmaxf(fminf(value[i], 65504.f), -65504.f);
    }
    at[0] = make_uint4(pack<Float16>(value[0], value[1]), pack<Float16>(value[2], value[3]),
                       pack<Float16>(value[4], value[5]), pack<Float16>(value[6], value[7]));
  }
}

// lse (for 16-bit tensors times log2(e)) and -delta of every query; an infinite lse makes the weights of a query
// without output zero.
template <class T>
__global__ void __launch_bounds__(256) prepare_rows(const Call call) {
  const int64_t thread = thread_of_grid();
  if (thread >= static_cast<int64_t>(call.windows) * call.padded * call.heads) return;
  const int head = static_cast<int>(thread % call.heads);
  const int t = static_cast<int>(thread / call.heads % call.padded);
  const int64_t window = thread / call.heads / call.padded;
  const uint32_t token = call.tokens[window % call.windows_a_volume * call.padded + t].x;
  float2 row = make_float2(kInfinity, 0);
  if (token < kPadding) {
    const int64_t position = window / call.windows_a_volume * call.volume_tokens + token;
    const int64_t at = (position * call.heads + head) * call.head_dim;
    const uint4* out = reinterpret_cast<const uint4*>(static_cast<const T*>(call.out) + at);
    const uint4* grad = reinterpret_cast<const uint4*>(static_cast<const T*>(call.grad_out) + at);
    float delta = 0;
    SWIN_NO_UNROLL
    for (int piece = 0; piece < call.head_dim * static_cast<int>(sizeof(T)) / 16; ++piece) {
      delta += dot_of<T>(out[piece], grad[piece]);
    }
    const float lse = call.lse[position * call.heads + head];
    row = make_float2(sizeof(T) == 2 ? lse * kLog2E : lse, -delta);
  }
  call.rows[(window * call.heads + head) * call.padded + t] = row;
}

// ---- 2. gradients of q, k and v, 16-bit ----------------------------------------------------------------------------

// How the 16-bit kernels cut a head of D channels.
template <int D>
struct Cut {
  static constexpr int kDepth = D < kTile ? kTile : D;  // channels in shared memory: an mma multiplies at least 16
  static constexpr int kStride = kDepth + 8;  // elements from row to row: ldmatrix finds 8 rows in different banks
  static constexpr int kSteps = kDepth / kTile;
  static constexpr int kColumns = D / 8;             // of an mma that has channels in columns
  static constexpr int kPairs = (kColumns + 1) / 2;  // ldmatrix brings two at a time
  static constexpr int kKeyTiles = D <= 32 ? 2 : 1;  // of a warp; bounded by the sums it keeps in registers
  static constexpr int kWarpKeys = kKeyTiles * kTile;
  static constexpr int kMaxWarps = D <= 16 ? 12 : 8;  // so that a thread may have 168 or 255 registers
};

// Where a lane points ldmatrix_x4 to, from the first element of a 16 x 16 tile: the four 8 x 8 matrices in the order
// (rows 0-7, 8-15 of columns 0-7, then of columns 8-15), and in the order (columns 0-7, 8-15 of rows 0-7, then of rows
// 8-15). The first gives an A fragment, and transposed the B fragments of two column blocks; the second the B fragments
// of two column blocks that lie in rows, and transposed an A fragment.
SWIN_DEVICE int down_first(int lane, int stride) { return lane % 16 * stride + lane / 16 * 8; }
SWIN_DEVICE int across_first(int lane, int stride) { return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8; }

// A block owns one head and every gridDim.x-th window; while it works on one, the next is on its way into shared
// memory. A warp owns kWarpKeys keys at a time, whose k and v stay in its registers as do the sums for dk and dv;
// queries pass by in blocks. Score tiles have keys in rows: as the mma leaves p and ds, they are the left factors of dv
// += p grad_out and dk += ds q. dq needs the sum over all keys, so the warps put ds into shared memory, and each then
// multiplies some tiles of ds^T k.
template <class T, int D>
__global__ void __launch_bounds__(32 * Cut<D>::kMaxWarps)
    differentiate_qkv(const Call call, const int key_blocks, const int query_block) {
  using C = Cut<D>;
  const int lane = lane_index(), warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.y), stride = static_cast<int>(gridDim.x);
  const int block_keys = warps * C::kWarpKeys, ds_stride = query_block + 8;
  const int tile_size = 32 * BiasTile<T>::kPieces, tile_row = call.padded / kTile * tile_size;
  const int64_t channels = channels_of(call);

  T* all_k_rows = reinterpret_cast<T*>(shared_memory());     // (2, block_keys, kStride)
  T* all_v_rows = all_k_rows + 2 * block_keys * C::kStride;  // (2, block_keys, kStride)
  T* q_rows = all_v_rows + 2 * block_keys * C::kStride;      // (2, query_block, kStride)
  T* grad_rows = q_rows + 2 * query_block * C::kStride;      // (2, query_block, kStride)
  T* ds_rows = grad_rows + 2 * query_block * C::kStride;     // (block_keys, ds_stride): keys in rows
  float2* row_rows = reinterpret_cast<float2*>(ds_rows + block_keys * ds_stride);  // (2, query_block)

  const auto stage_keys = [&](int window_index, int key_block, int buffer) {
    const Window window = window_at(call, window_index);
    const int first = key_block * block_keys, at = buffer * block_keys * C::kStride;
    const int count = block_keys < call.padded - first ? block_keys : call.padded - first;
    stage<T, D, C::kDepth>(all_k_rows + at, C::kStride, window.tokens + first, count, part_of<T>(call, window, head, 1),
                           3 * channels, pad_of<T>(call, head, 1));
    stage<T, D, C::kDepth>(all_v_rows + at, C::kStride, window.tokens + first, count, part_of<T>(call, window, head, 2),
                           3 * channels, pad_of<T>(call, head, 2));
  };
  const auto stage_queries = [&](int window_index, int first, int buffer) {
    const Window window = window_at(call, window_index);
    const int count = query_block < call.padded - first ? query_block : call.padded - first;
    const int at = buffer * query_block;
    stage<T, D, C::kDepth>(q_rows + at * C::kStride, C::kStride, window.tokens + first, count,
                           part_of<T>(call, window, head, 0), 3 * channels, nullptr);
    stage<T, D, C::kDepth>(grad_rows + at * C::kStride, C::kStride, window.tokens + first, count,
                           grad_of<T>(call, window, head), channels, nullptr);
    stage_rows(row_rows + at, rows_of(call, window_index, head) + first, count);
    cp_async_commit();
  };

  int window_index = static_cast<int>(blockIdx.x), key_block = 0;
  int buffer = 0;  // of the queries
  stage_keys(window_index, 0, 0);
  stage_queries(window_index, 0, 0);
  cp_async_wait<0>();
  block_barrier();
  for (int key_buffer = 0; window_index < call.windows; key_buffer ^= 1) {
    const int next_key_block = key_block + 1 < key_blocks ? key_block + 1 : 0;
    const int next_window = next_key_block > 0 ? window_index : window_index + stride;
    const Window window = window_at(call, window_index);
    T* grad_qkv = static_cast<T*>(call.grad_qkv) + window.first * 3 * channels + head * D;
    const T* k_rows = all_k_rows + key_buffer * block_keys * C::kStride;
    const T* v_rows = all_v_rows + key_buffer * block_keys * C::kStride;
    const int first_key = key_block * block_keys, own = first_key + warp * C::kWarpKeys;
    const int left = call.n - first_key, keys = block_keys < left ? block_keys : left;
    const int key_steps = (keys + kTile - 1) / kTile;  // of ds^T k
    const bool active = own < call.n;                  // the same for a whole warp
    const uint4* bias_tiles = call.tiles + tile_offset<T>(call, 0, head, active ? own / kTile : 0, 0);

    uint32_t k_tile[C::kKeyTiles][C::kSteps][4], v_tile[C::kKeyTiles][C::kSteps][4];
    uint32_t region[C::kKeyTiles][2];
    float grad_k[C::kKeyTiles][C::kColumns][4] = {}, grad_v[C::kKeyTiles][C::kColumns][4] = {};
    if (active) {
      SWIN_UNROLL
      for (int tile = 0; tile < C::kKeyTiles; ++tile) {
        const int row = (warp * C::kKeyTiles + tile) * kTile;
        SWIN_UNROLL
        for (int step = 0; step < C::kSteps; ++step) {
          const int at = row * C::kStride + step * kTile + down_first(lane, C::kStride);
          ldmatrix_x4(k_tile[tile][step], k_rows + at);
          ldmatrix_x4(v_tile[tile][step], v_rows + at);
        }
        region[tile][0] = window.tokens[first_key + row + g].y;
        region[tile][1] = window.tokens[first_key + row + g + 8].y;
      }
    }

    for (int first = 0; first < call.n; first += query_block, buffer ^= 1) {
      if (first + query_block < call.n) {
        stage_queries(window_index, first + query_block, buffer ^ 1);
      } else if (next_window < call.windows) {
        stage_keys(next_window, next_key_block, key_buffer ^ 1);
        stage_queries(next_window, 0, buffer ^ 1);
      }
      const int queries = call.n - first < query_block ? call.n - first : query_block;
      const int steps = (queries + kTile - 1) / kTile;
      const T* q_block = q_rows + buffer * query_block * C::kStride;
      const T* grad_block = grad_rows + buffer * query_block * C::kStride;
      if (active) {
        SWIN_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
          const int query = first + step * kTile;
          BiasTile<T> packed_bias[C::kKeyTiles];
          SWIN_UNROLL
          for (int tile = 0; tile < C::kKeyTiles; ++tile) {
            packed_bias[tile] = load_tile<T>(bias_tiles + tile * tile_row + query / kTile * tile_size);
          }
          float s[C::kKeyTiles][2][4] = {}, dp[C::kKeyTiles][2][4], delta[2][4];
          float lse[2][2];  // times log2(e), of queries 2t and 2t + 1 of both halves of the tile
          SWIN_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float4 two = load_shared(
                reinterpret_cast<const float4*>(row_rows + buffer * query_block + step * kTile + half * 8 + 2 * t));
            lse[half][0] = two.x, lse[half][1] = two.z;
            delta[half][0] = delta[half][2] = two.y, delta[half][1] = delta[half][3] = two.w;
          }
          const int first_row = step * kTile * C::kStride;
          SWIN_UNROLL
          for (int depth = 0; depth < C::kSteps; ++depth) {
            const int at = first_row + depth * kTile + across_first(lane, C::kStride);
            uint32_t q_tile[4], grad_tile[4];
            ldmatrix_x4(q_tile, q_block + at);
            ldmatrix_x4(grad_tile, grad_block + at);
            SWIN_UNROLL
            for (int tile = 0; tile < C::kKeyTiles; ++tile) {
              SWIN_UNROLL
              for (int half = 0; half < 2; ++half) {
                mma_m16n8k16<T>(s[tile][half], k_tile[tile][depth], q_tile[2 * half], q_tile[2 * half + 1],
                                s[tile][half]);
                mma_m16n8k16<T>(dp[tile][half], v_tile[tile][depth], grad_tile[2 * half], grad_tile[2 * half + 1],
                                depth == 0 ? delta[half] : dp[tile][half]);
              }
            }
          }

          uint32_t p_tile[C::kKeyTiles][4], ds_tile[C::kKeyTiles][4];  // as left factors
          SWIN_UNROLL
          for (int tile = 0; tile < C::kKeyTiles; ++tile) {
            float bias[2][4];
            unpack_tile(packed_bias[tile], bias);
            if (window.seam) {
              SWIN_UNROLL
              for (int i = 0; i < 8; ++i) {
                const uint32_t other = window.tokens[query + i / 4 * 8 + 2 * t + i % 2].y;
                if (other != region[tile][i / 2 % 2]) bias[i / 4][i % 4] += kMask;
              }
            }
            SWIN_UNROLL
            for (int half = 0; half < 2; ++half) {
              float p[4], ds[4];
              SWIN_UNROLL
              for (int i = 0; i < 4; ++i) {
                const float score = fmaf(s[tile][half][i], call.scale, bias[half][i]);
                p[i] = exp2_approx(fmaf(score, kLog2E, -lse[half][i % 2]));
                ds[i] = p[i] * dp[tile][half][i];
              }
              p_tile[tile][2 * half] = pack<T>(p[0], p[1]), p_tile[tile][2 * half + 1] = pack<T>(p[2], p[3]);
              ds_tile[tile][2 * half] = pack<T>(ds[0], ds[1]), ds_tile[tile][2 * half + 1] = pack<T>(ds[2], ds[3]);
              T* at =
                  ds_rows + ((warp * C::kKeyTiles + tile) * kTile + g) * ds_stride + step * kTile + half * 8 + 2 * t;
              store_shared(reinterpret_cast<uint32_t*>(at), ds_tile[tile][2 * half]);
              store_shared(reinterpret_cast<uint32_t*>(at + 8 * ds_stride), ds_tile[tile][2 * half + 1]);
            }
          }
          SWIN_UNROLL
          for (int pair = 0; pair < C::kPairs; ++pair) {
            const int at = first_row + pair * kTile + down_first(lane, C::kStride);
            uint32_t q_tile[4], grad_tile[4];
            ldmatrix_x4_trans(q_tile, q_block + at);
            ldmatrix_x4_trans(grad_tile, grad_block + at);
            SWIN_UNROLL
            for (int column = 2 * pair; column < 2 * pair + 2 && column < C::kColumns; ++column) {
              const int b = column % 2 * 2;
              SWIN_UNROLL
              for (int tile = 0; tile < C::kKeyTiles; ++tile) {
                mma_m16n8k16<T>(grad_v[tile][column], p_tile[tile], grad_tile[b], grad_tile[b + 1],
                                grad_v[tile][column]);
                mma_m16n8k16<T>(grad_k[tile][column], ds_tile[tile], q_tile[b], q_tile[b + 1], grad_k[tile][column]);
              }
            }
          }
        }
      }
      block_barrier();  // ds of this block of queries is complete

      for (int unit = warp; unit < steps * C::kPairs; unit += warps) {
        const int step = unit / C::kPairs, pair = unit % C::kPairs;
        float sums[C::kKeyTiles][2][4] = {};  // as many chains of products as tiles of a warp, to hide latency
        for (int key_step = 0; key_step < key_steps; key_step += C::kKeyTiles) {
          SWIN_UNROLL
          for (int tile = 0; tile < C::kKeyTiles; ++tile) {
            const int row = (key_step + tile) * kTile;
            uint32_t ds_tile[4], k_columns[4];
            ldmatrix_x4_trans(ds_tile, ds_rows + row * ds_stride + step * kTile + across_first(lane, ds_stride));
            ldmatrix_x4_trans(k_columns, k_rows + row * C::kStride + pair * kTile + down_first(lane, C::kStride));
            SWIN_UNROLL
            for (int column = 0; column < 2 && 2 * pair + column < C::kColumns; ++column) {
              mma_m16n8k16<T>(sums[tile][column], ds_tile, k_columns[2 * column], k_columns[2 * column + 1],
                              sums[tile][column]);
            }
          }
        }
        float (&sum)[2][4] = sums[0];
        SWIN_UNROLL
        for (int i = 0; i < 8 * (C::kKeyTiles - 1); ++i) sum[i / 4][i % 4] += sums[C::kKeyTiles - 1][i / 4][i % 4];
        SWIN_UNROLL
        for (int column = 0; column < 2 && 2 * pair + column < C::kColumns; ++column) {
          SWIN_UNROLL
          for (int lower = 0; lower < 2; ++lower) {
            const int query = first + step * kTile + lower * 8 + g, channel = (2 * pair + column) * 8 + 2 * t;
            const uint32_t token = window.tokens[query].x;
            if (token >= kPadding) continue;  // it has no output, so its q has no gradient
            float2 value = make_float2(sum[column][2 * lower], sum[column][2 * lower + 1]);
            if (key_blocks > 1) {  // the same thread adds to the same elements in every block of keys
              float2* part = reinterpret_cast<float2*>(
                  call.grad_q_part +
                  ((static_cast<int64_t>(window_index) * call.heads + head) * call.padded + query) * D + channel);
              if (key_block > 0) value = make_float2(value.x + part->x, value.y + part->y);
              if (key_block < key_blocks - 1) {
                *part = value;
                continue;
              }
            }
            *reinterpret_cast<uint32_t*>(grad_qkv + token * 3 * channels + channel) =
                pack<T>(value.x * call.scale, value.y * call.scale);
          }
        }
      }
      cp_async_wait<0>();
      block_barrier();  // the next queries (and keys) are there, ds may be overwritten
    }

    float pad_sum[2][C::kColumns][2] = {};  // of k and v, channels 2t and 2t + 1 of each column block
    if (active) {
      SWIN_UNROLL
      for (int tile = 0; tile < C::kKeyTiles; ++tile) {
        SWIN_UNROLL
        for (int lower = 0; lower < 2; ++lower) {
          const uint32_t token = window.tokens[own + tile * kTile + lower * 8 + g].x;
          SWIN_UNROLL
          for (int column = 0; column < C::kColumns; ++column) {
            const float dk[2] = {grad_k[tile][column][2 * lower] * call.scale,
                                 grad_k[tile][column][2 * lower + 1] * call.scale};
            const float dv[2] = {grad_v[tile][column][2 * lower], grad_v[tile][column][2 * lower + 1]};
            if (token < kPadding) {
              T* at = grad_qkv + token * 3 * channels + column * 8 + 2 * t;
              *reinterpret_cast<uint32_t*>(at + channels) = pack<T>(dk[0], dk[1]);
              *reinterpret_cast<uint32_t*>(at + 2 * channels) = pack<T>(dv[0], dv[1]);
            } else if (token == kPadding) {
              pad_sum[0][column][0] += dk[0], pad_sum[0][column][1] += dk[1];
              pad_sum[1][column][0] += dv[0], pad_sum[1][column][1] += dv[1];
            }
          }
        }
      }
    }
    if (call.has_padding) {
      float* sums = reinterpret_cast<float*>(ds_rows);  // (warps, 2, D)
      SWIN_UNROLL
      for (int i = 0; i < 4 * C::kColumns; ++i) {
        const int part = i / (2 * C::kColumns), column = i / 2 % C::kColumns, channel = i % 2;
        float sum = pad_sum[part][column][channel];
        for (int distance = 4; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
        if (g == 0) store_shared(sums + (warp * 2 + part) * D + column * 8 + 2 * t + channel, sum);
      }
      block_barrier();
      for (int i = static_cast<int>(threadIdx.x); i < 2 * D; i += static_cast<int>(blockDim.x)) {
        float sum = 0;
        for (int from = 0; from < warps; ++from) sum += load_shared(sums + from * 2 * D + i);
        const int64_t row = static_cast<int64_t>(window_index) * key_blocks + key_block;
        call.pad_parts[row * 2 * channels + i / D * channels + head * D + i % D] = sum;
      }
      block_barrier();
    }
    window_index = next_window, key_block = next_key_block;
  }
}

// ---- 3. gradient of the bias, 16-bit -------------------------------------------------------------------------------

constexpr int kBiasKeys = 64;  // of a block
constexpr int kBiasWarpQueries = 32;
constexpr int kBiasMaxWarps = 6;

// A block owns one head and a tile of queries x kBiasKeys, and sums ds over every gridDim.z-th window; a warp keeps the
// sums of its 32 queries in registers. Two blocks share a multiprocessor where their registers allow it.
template <class T, int D>
__global__ void __launch_bounds__(32 * kBiasMaxWarps, BiasTile<T>::kPieces == 1 && D <= 16 ? 2 : 1)
    differentiate_bias(const Call call) {
  using C = Cut<D>;
  constexpr int kTiles = kBiasWarpQueries / kTile, kKeyTiles = kBiasKeys / kTile;
  const int lane = lane_index(), warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int g = lane / 4, t = lane % 4;
  const int key_blocks = call.padded / kBiasKeys, head = static_cast<int>(blockIdx.y);
  const int block_queries = warps * kBiasWarpQueries;
  const int first_query = static_cast<int>(blockIdx.x) / key_blocks * block_queries;
  const int first_key = static_cast<int>(blockIdx.x) % key_blocks * kBiasKeys;
  const int left = call.padded - first_query, queries = block_queries < left ? block_queries : left;
  const int own = first_query + warp * kBiasWarpQueries;
  const bool active = own < call.n;
  const int64_t channels = channels_of(call);
  const int tile_size = 32 * BiasTile<T>::kPieces, tile_row = call.padded / kTile * tile_size;
  const uint4* bias_tiles = call.tiles + tile_offset<T>(call, 1, head, active ? own / kTile : 0, first_key / kTile);

  T* q_rows = reinterpret_cast<T*>(shared_memory());                                  // (2, block_queries, kStride)
  T* grad_rows = q_rows + 2 * block_queries * C::kStride;                             // (2, block_queries, kStride)
  T* k_rows = grad_rows + 2 * block_queries * C::kStride;                             // (2, kBiasKeys, kStride)
  T* v_rows = k_rows + 2 * kBiasKeys * C::kStride;                                    // (2, kBiasKeys, kStride)
  float2* row_rows = reinterpret_cast<float2*>(v_rows + 2 * kBiasKeys * C::kStride);  // (2, block_queries)

  const auto stage_window = [&](int window_index, int buffer) {
    const Window window = window_at(call, window_index);
    const int query_row = buffer * block_queries * C::kStride, key_row = buffer * kBiasKeys * C::kStride;
    const uint2 *query_tokens = window.tokens + first_query, *key_tokens = window.tokens + first_key;
    stage<T, D, C::kDepth>(q_rows + query_row, C::kStride, query_tokens, queries, part_of<T>(call, window, head, 0),
                           3 * channels, nullptr);
    stage<T, D, C::kDepth>(grad_rows + query_row, C::kStride, query_tokens, queries, grad_of<T>(call, window, head),
                           channels, nullptr);
    stage<T, D, C::kDepth>(k_rows + key_row, C::kStride, key_tokens, kBiasKeys, part_of<T>(call, window, head, 1),
                           3 * channels, pad_of<T>(call, head, 1));
    stage<T, D, C::kDepth>(v_rows + key_row, C::kStride, key_tokens, kBiasKeys, part_of<T>(call, window, head, 2),
                           3 * channels, pad_of<T>(call, head, 2));
    stage_rows(row_rows + buffer * block_queries, rows_of(call, window_index, head) + first_query, queries);
    cp_async_commit();
  };

  float total[kTiles][kKeyTiles][2][4] = {};
  const int stride = static_cast<int>(gridDim.z), begin = static_cast<int>(blockIdx.z);
  stage_window(begin, 0);
  for (int index = begin, buffer = 0; index < call.windows; index += stride, buffer ^= 1) {
    cp_async_wait<0>();
    block_barrier();  // this window is there, and nobody reads the other buffer any more
    if (index + stride < call.windows) stage_window(index + stride, buffer ^ 1);
    if (!active) continue;
    const Window window = window_at(call, index);
    const int query_row = (buffer * block_queries + warp * kBiasWarpQueries) * C::kStride;
    const int key_row = buffer * kBiasKeys * C::kStride;
    uint32_t q_tile[kTiles][C::kSteps][4], grad_tile[kTiles][C::kSteps][4];
    float lse[kTiles][2], delta[kTiles][4];
    SWIN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      SWIN_UNROLL
      for (int step = 0; step < C::kSteps; ++step) {
        const int at = query_row + tile * kTile * C::kStride + step * kTile + down_first(lane, C::kStride);
        ldmatrix_x4(q_tile[tile][step], q_rows + at);
        ldmatrix_x4(grad_tile[tile][step], grad_rows + at);
      }
      SWIN_UNROLL
      for (int lower = 0; lower < 2; ++lower) {
        const float2 row =
            load_shared(row_rows + buffer * block_queries + warp * kBiasWarpQueries + tile * kTile + lower * 8 + g);
        lse[tile][lower] = row.x, delta[tile][2 * lower] = delta[tile][2 * lower + 1] = row.y;
      }
    }
    SWIN_UNROLL
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      if (first_key + key_tile * kTile >= call.n) break;
      float s[kTiles][2][4] = {}, dp[kTiles][2][4];
      BiasTile<T> packed_bias[kTiles];
      SWIN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        packed_bias[tile] = load_tile<T>(bias_tiles + tile * tile_row + key_tile * tile_size);
      }
      SWIN_UNROLL
      for (int step = 0; step < C::kSteps; ++step) {
        const int at = key_row + key_tile * kTile * C::kStride + step * kTile + across_first(lane, C::kStride);
        uint32_t k_tile[4], v_tile[4];
        ldmatrix_x4(k_tile, k_rows + at);
        ldmatrix_x4(v_tile, v_rows + at);
        SWIN_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
          SWIN_UNROLL
          for (int half = 0; half < 2; ++half) {
            mma_m16n8k16<T>(s[tile][half], q_tile[tile][step], k_tile[2 * half], k_tile[2 * half + 1], s[tile][half]);
            mma_m16n8k16<T>(dp[tile][half], grad_tile[tile][step], v_tile[2 * half], v_tile[2 * half + 1],
                            step == 0 ? delta[tile] : dp[tile][half]);
          }
        }
      }
      SWIN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        float bias[2][4];
        unpack_tile(packed_bias[tile], bias);
        if (window.seam) {
          SWIN_UNROLL
          for (int i = 0; i < 8; ++i) {
            const uint32_t key_region = window.tokens[first_key + key_tile * kTile + i / 4 * 8 + 2 * t + i % 2].y;
            const uint32_t query_region = window.tokens[own + tile * kTile + i / 2 % 2 * 8 + g].y;
            if (key_region != query_region) bias[i / 4][i % 4] += kMask;
          }
        }
        SWIN_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float score = fmaf(s[tile][i / 4][i % 4], call.scale, bias[i / 4][i % 4]);
          const float p = exp2_approx(fmaf(score, kLog2E, -lse[tile][i / 2 % 2]));
          total[tile][key_tile][i / 4][i % 4] = fmaf(p, dp[tile][i / 4][i % 4], total[tile][key_tile][i / 4][i % 4]);
        }
      }
    }
  }
  if (!active) return;
  float* plane = call.planes + (static_cast<int64_t>(head) * stride + begin) * call.padded * call.padded;
  SWIN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    SWIN_UNROLL
    for (int i = 0; i < 4 * kKeyTiles; ++i) {
      const int key_tile = i / 4, half = i / 2 % 2, lower = i % 2;
      const int query = own + tile * kTile + lower * 8 + g, key = first_key + key_tile * kTile + half * 8 + 2 * t;
      if (query >= call.padded) continue;
      const float (&four)[4] = total[tile][key_tile][half];
      *reinterpret_cast<float2*>(plane + static_cast<int64_t>(query) * call.padded + key) =
          make_float2(four[2 * lower], four[2 * lower + 1]);
    }
  }
}

// ---- 2. and 3. in float32 ------------------------------------------------------------------------------------------

constexpr int kFloatThreads = 128;
constexpr int kFloatChunk = 32;  // rows of the other side that are staged at a time
constexpr int kFloatTile = 32;   // queries and keys of a block of differentiate_bias_float

// exp(score - lse); of large scores only the difference is exact.
SWIN_DEVICE float weight_of(float score, float lse) { return exp2_approx((score - lse) * kLog2E); }

SWIN_DEVICE float bias_of(const Call& call, int head, int query_raster, int key_raster) {
  const int64_t entry = query_raster - key_raster + static_cast<int>(bias_origin(call.grid));
  return load_table<float>(call, entry * call.heads + head);
}

// The gradient of q, or those of k and v: a thread owns 8 or 16 channels of one query, or of one key, and walks over
// the tokens on the other side. One block a multiprocessor is asked for: for more of them ptxas would spill.
template <int D, bool kKeys>
__global__ void __launch_bounds__(kFloatThreads, 1) differentiate_rows_float(const Call call) {
  constexpr int kOwn = D < 16 ? D : 16, kLanes = D / kOwn;
  const int window_index = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int rows_here = kFloatThreads / kLanes, within = static_cast<int>(threadIdx.x) / kLanes;
  const int own = static_cast<int>(blockIdx.z) * rows_here + within;
  const int channel = static_cast<int>(threadIdx.x) % kLanes * kOwn;
  const int64_t channels = channels_of(call);
  const Window window = window_at(call, window_index);
  const float2* rows = rows_of(call, window_index, head);
  float* other_a = reinterpret_cast<float*>(shared_memory());  // (kFloatChunk, D): k of keys, or q of queries
  float* other_b = other_a + kFloatChunk * D;                  // (kFloatChunk, D): v, or grad_out
  float2* other_rows = reinterpret_cast<float2*>(other_b + kFloatChunk * D);  // (kFloatChunk)

  const uint2 token = own < call.n ? window.tokens[own] : make_uint2(kAbsent, 0);
  const bool works = token.x < kPadding || (kKeys && token.x == kPadding);
  const int raster = own < call.n ? call.rasters[own] : 0;
  const float2 own_row = own < call.n ? rows[own] : make_float2(kInfinity, 0);
  float a[kOwn] = {}, b[kOwn] = {}, grad_a[kOwn] = {}, grad_b[kOwn] = {};
  const float *from_a = nullptr, *from_b = nullptr;
  if (token.x < kPadding) {
    from_a = part_of<float>(call, window, head, kKeys ? 1 : 0) + token.x * 3 * channels;
    from_b = kKeys ? from_a + channels : grad_of<float>(call, window, head) + token.x * channels;
  } else if (works) {
    from_a = pad_of<float>(call, head, 1), from_b = pad_of<float>(call, head, 2);
  }
  SWIN_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    if (from_a != nullptr) a[i] = from_a[channel + i], b[i] = from_b[channel + i];
  }

  for (int first = 0; first < call.n; first += kFloatChunk) {
    const uint2* tokens = window.tokens + first;
    if (kKeys) {
      stage<float, D, D>(other_a, D, tokens, kFloatChunk, part_of<float>(call, window, head, 0), 3 * channels, nullptr);
      stage<float, D, D>(other_b, D, tokens, kFloatChunk, grad_of<float>(call, window, head), channels, nullptr);
      stage_rows(other_rows, rows + first, kFloatChunk);
    } else {
      stage<float, D, D>(other_a, D, tokens, kFloatChunk, part_of<float>(call, window, head, 1), 3 * channels,
                         pad_of<float>(call, head, 1));
      stage<float, D, D>(other_b, D, tokens, kFloatChunk, part_of<float>(call, window, head, 2), 3 * channels,
                         pad_of<float>(call, head, 2));
    }
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    const int count = call.n - first < kFloatChunk ? call.n - first : kFloatChunk;
    SWIN_NO_UNROLL
    for (int other = 0; other < count; ++other) {
      float score = 0, dp = 0;
      float at_a[kOwn], at_b[kOwn];
      SWIN_UNROLL
      for (int i = 0; i < kOwn; i += 4) {
        const float4 x = load_shared(reinterpret_cast<const float4*>(other_a + other * D + channel + i));
        const float4 y = load_shared(reinterpret_cast<const float4*>(other_b + other * D + channel + i));
        at_a[i] = x.x, at_a[i + 1] = x.y, at_a[i + 2] = x.z, at_a[i + 3] = x.w;
        at_b[i] = y.x, at_b[i + 1] = y.y, at_b[i + 2] = y.z, at_b[i + 3] = y.w;
      }
      // In the forward's order: the rounding of large scores then cancels against that of lse.
      SWIN_UNROLL
      for (int i = 0; i < kOwn; i += 4) {
        SWIN_UNROLL
        for (int j = i + 3; j >= i; --j) score = fmaf(a[j], at_a[j], score), dp = fmaf(b[j], at_b[j], dp);
      }
      SWIN_UNROLL
      for (int lanes = 1; lanes < kLanes; lanes *= 2) {
        score += shuffle_xor(score, lanes);
        dp += shuffle_xor(dp, lanes);
      }
      if (!works) continue;
      const float2 row = kKeys ? load_shared(other_rows + other) : own_row;
      const int other_raster = call.rasters[first + other];
      score = fmaf(score, call.scale,
                   kKeys ? bias_of(call, head, other_raster, raster) : bias_of(call, head, raster, other_raster));
      if (window.seam && tokens[other].y != token.y) score += kMask;
      const float p = weight_of(score, row.x), ds = p * (dp + row.y);
      SWIN_UNROLL
      for (int i = 0; i < kOwn; ++i) {
        grad_a[i] = fmaf(ds, at_a[i], grad_a[i]);
        if (kKeys) grad_b[i] = fmaf(p, at_b[i], grad_b[i]);
      }
    }
    block_barrier();
  }

  float* grad_qkv = static_cast<float*>(call.grad_qkv) + (window.first + token.x) * 3 * channels + head * D + channel;
  SWIN_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    grad_a[i] *= call.scale;
    if (token.x >= kPadding) continue;
    grad_qkv[(kKeys ? channels : 0) + i] = grad_a[i];
    if (kKeys) grad_qkv[2 * channels + i] = grad_b[i];
  }
  if (kKeys && call.has_padding) {
    float* sums = reinterpret_cast<float*>(shared_memory());  // (rows_here, 2, D)
    SWIN_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      store_shared(sums + within * 2 * D + channel + i, token.x == kPadding ? grad_a[i] : 0.f);
      store_shared(sums + within * 2 * D + D + channel + i, token.x == kPadding ? grad_b[i] : 0.f);
    }
    block_barrier();
    for (int i = static_cast<int>(threadIdx.x); i < 2 * D; i += kFloatThreads) {
      float sum = 0;
      for (int row = 0; row < rows_here; ++row) sum += load_shared(sums + row * 2 * D + i);
      const int64_t row = static_cast<int64_t>(window_index) * gridDim.z + blockIdx.z;
      call.pad_parts[row * 2 * channels + i / D * channels + head * D + i % D] = sum;
    }
  }
}

// As differentiate_bias; a thread owns 2 x 2 pairs of tokens.
template <int D>
__global__ void __launch_bounds__(256) differentiate_bias_float(const Call call) {
  constexpr int kStride = D + 4;
  const int side = call.padded / kFloatTile, head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(blockIdx.x) / side * kFloatTile;
  const int first_key = static_cast<int>(blockIdx.x) % side * kFloatTile;
  const int query = static_cast<int>(threadIdx.x) / 16, key = static_cast<int>(threadIdx.x) % 16;  // and 16 further
  const int64_t channels = channels_of(call);
  float* q_rows = reinterpret_cast<float*>(shared_memory());  // four times (kFloatTile, kStride)
  float* grad_rows = q_rows + kFloatTile * kStride;
  float* k_rows = grad_rows + kFloatTile * kStride;
  float* v_rows = k_rows + kFloatTile * kStride;

  float bias[4], total[4] = {};
  SWIN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int at_query = first_query + query + i / 2 * 16, at_key = first_key + key + i % 2 * 16;
    const bool exists = at_query < call.n && at_key < call.n;
    bias[i] = exists ? bias_of(call, head, call.rasters[at_query], call.rasters[at_key]) : -kInfinity;
  }
  for (int index = static_cast<int>(blockIdx.z); index < call.windows; index += static_cast<int>(gridDim.z)) {
    const Window window = window_at(call, index);
    const uint2 *queries = window.tokens + first_query, *keys = window.tokens + first_key;
    const float2* rows = rows_of(call, index, head) + first_query;
    stage<float, D, D>(q_rows, kStride, queries, kFloatTile, part_of<float>(call, window, head, 0), 3 * channels,
                       nullptr);
    stage<float, D, D>(grad_rows, kStride, queries, kFloatTile, grad_of<float>(call, window, head), channels, nullptr);
    stage<float, D, D>(k_rows, kStride, keys, kFloatTile, part_of<float>(call, window, head, 1), 3 * channels,
                       pad_of<float>(call, head, 1));
    stage<float, D, D>(v_rows, kStride, keys, kFloatTile, part_of<float>(call, window, head, 2), 3 * channels,
                       pad_of<float>(call, head, 2));
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    float s[4] = {}, dp[4] = {};
    SWIN_NO_UNROLL
    for (int channel = 0; channel < D; channel += 4) {
      float4 q[2], grad[2], k[2], v[2];
      SWIN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int query_at = (query + 16 * i) * kStride + channel, key_at = (key + 16 * i) * kStride + channel;
        q[i] = load_shared(reinterpret_cast<const float4*>(q_rows + query_at));
        grad[i] = load_shared(reinterpret_cast<const float4*>(grad_rows + query_at));
        k[i] = load_shared(reinterpret_cast<const float4*>(k_rows + key_at));
        v[i] = load_shared(reinterpret_cast<const float4*>(v_rows + key_at));
      }
      SWIN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float4 &x = q[i / 2], &y = k[i % 2], &u = grad[i / 2], &w = v[i % 2];
        s[i] = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, s[i]))));
        dp[i] = fmaf(u.x, w.x, fmaf(u.y, w.y, fmaf(u.z, w.z, fmaf(u.w, w.w, dp[i]))));
      }
    }
    SWIN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at_query = query + i / 2 * 16, at_key = key + i % 2 * 16;
      const float mask = window.seam && queries[at_query].y != keys[at_key].y ? kMask : 0.f;
      const float2 row = rows[at_query];
      total[i] = fmaf(weight_of(fmaf(s[i], call.scale, bias[i]) + mask, row.x), dp[i] + row.y, total[i]);
    }
    block_barrier();
  }
  float* plane = call.planes + (static_cast<int64_t>(head) * gridDim.z + blockIdx.z) * call.padded * call.padded;
  SWIN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t at_query = first_query + query + i / 2 * 16;
    plane[at_query * call.padded + first_key + key + i % 2 * 16] = total[i];
  }
}

// ---- 4. sums in a fixed order --------------------------------------------------------------------------------------

// The first plane of each head becomes the sum of its parts.
__global__ void __launch_bounds__(256) sum_planes(const Call call) {
  const int64_t plane = static_cast<int64_t>(call.padded) * call.padded, element = thread_of_grid();
  if (element >= static_cast<int64_t>(call.n) * call.padded) return;  // further rows were not written
  float* at = call.planes + blockIdx.y * call.parts * plane + element;
  float sum = 0;
  for (int part = 0; part < call.parts; ++part) sum += at[part * plane];
  *at = sum;
}

// A warp sums the pairs of tokens that share one entry of the table: the key of each query follows from the entry.
template <class T>
__global__ void __launch_bounds__(256) reduce_to_table(const Call call) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp_index();
  if (entry >= bias_table_length(call.grid)) return;
  const int head = static_cast<int>(blockIdx.y);
  const float* plane = call.planes + static_cast<int64_t>(head) * call.parts * call.padded * call.padded;
  const int offset = static_cast<int>(bias_origin(call.grid) - entry);
  const int extent[kAxes] = {static_cast<int>(call.grid.nominal[0]), static_cast<int>(call.grid.nominal[1]),
                             static_cast<int>(call.grid.nominal[2])};
  float sum = 0;
  const int queries = call.windows > 0 ? call.n : 0;  // in an empty batch no plane was written
  for (int query = lane_index(); query < queries; query += 32) {
    const int raster = call.rasters[query] + offset;  // of the key, if there is one
    const int rows = raster / (2 * extent[2] - 1), column = raster - rows * (2 * extent[2] - 1);
    const int planes = rows / (2 * extent[1] - 1), row = rows - planes * (2 * extent[1] - 1);
    const bool exists = raster >= 0 && column < extent[2] && row < extent[1] && planes < extent[0];
    const int key = (planes * extent[1] + row) * extent[2] + column;
    if (exists && key < call.n) sum += plane[static_cast<int64_t>(query) * call.padded + key];
  }
  for (int distance = 1; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
  if (lane_index() != 0) return;
  const int64_t at = entry * call.heads + head;
  if (call.float_table) {
    static_cast<float*>(call.grad_bias_table)[at] = sum;
  } else {
    static_cast<T*>(call.grad_bias_table)[at] = from_float<T>(sum);
  }
}

constexpr int kPadColumns = 32, kPadGroups = 32;

// grad_pad_qkv: nothing for q, for k and v the sums over blocks.
template <class T>
__global__ void __launch_bounds__(kPadColumns* kPadGroups) reduce_padding(const Call call) {
  const int64_t channels = channels_of(call);
  const int within = static_cast<int>(threadIdx.x) % kPadColumns, group = static_cast<int>(threadIdx.x) / kPadColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kPadColumns + within;
  float* sums = reinterpret_cast<float*>(shared_memory());  // (kPadGroups, kPadColumns)
  float sum = 0;
  if (column >= channels && column < 3 * channels) {
    for (int64_t row = group; row < call.pad_rows; row += kPadGroups) {
      sum += call.pad_parts[row * 2 * channels + column - channels];
    }
  }
  store_shared(sums + group * kPadColumns + within, sum);
  block_barrier();
  if (group != 0 || column >= 3 * channels) return;
  float whole = 0;
  for (int from = 0; from < kPadGroups; ++from) whole += load_shared(sums + from * kPadColumns + within);
  static_cast<T*>(call.grad_pad_qkv)[column] = from_float<T>(whole);
}

// ---- host ----------------------------------------------------------------------------------------------------------

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How one call is cut; everything follows from the call and the device.
struct Plan {
  int n, padded, windows_a_volume, windows;
  int key_warps, key_blocks, query_block, qkv_blocks;  // differentiate_qkv
  int64_t qkv_shared;
  int row_blocks;  // differentiate_rows_float
  int bias_warps, parts;
  int64_t bias_tiles, bias_shared;
  int pad_rows;
};

template <int D>
int64_t qkv_shared_bytes(int warps, int query_block) {
  using C = Cut<D>;
  const int64_t keys = warps * C::kWarpKeys;
  return 2 * (4 * keys * C::kStride + 4 * query_block * C::kStride + keys * (query_block + 8)) + 2 * query_block * 8;
}

template <int D>
int64_t bias_shared_bytes(int warps) {
  const int64_t queries = warps * kBiasWarpQueries;
  return 2 * 2 * 2 * (queries + kBiasKeys) * Cut<D>::kStride + 2 * queries * 8;
}

// Returns nullptr, or why the 16-bit kernels cannot run.
template <int D>
const char* cut_half(const DeviceLimits& limits, int64_t heads, Plan* plan) {
  using C = Cut<D>;
  const int64_t key_units = divide_up(plan->n, C::kWarpKeys);
  plan->key_blocks = static_cast<int>(divide_up(key_units, C::kMaxWarps));
  plan->key_warps = static_cast<int>(divide_up(key_units, plan->key_blocks));
  plan->query_block = plan->padded < 128 ? plan->padded : 128;
  while (qkv_shared_bytes<D>(plan->key_warps, plan->query_block) > limits.shared_per_block && plan->query_block > 16) {
    plan->query_block /= 2;
  }
  plan->qkv_shared = qkv_shared_bytes<D>(plan->key_warps, plan->query_block);
  // As many blocks as are resident at a time, shared among the heads; by shared memory, registers and threads.
  const int threads = plan->key_warps * 32;
  const int64_t by_shared = limits.shared_per_multiprocessor / (plan->qkv_shared + 1024);
  const int64_t by_registers = 65536 / (threads * (D <= 16 ? 168 : 255)), by_threads = 1536 / threads;
  int64_t resident = by_shared < by_registers ? by_shared : by_registers;
  if (by_threads < resident) resident = by_threads;
  int64_t blocks = (resident < 1 ? 1 : resident) * limits.multiprocessors / heads;
  if (blocks > plan->windows) blocks = plan->windows;
  plan->qkv_blocks = static_cast<int>(blocks < 1 ? 1 : blocks);

  const int64_t query_units = divide_up(plan->n, kBiasWarpQueries);
  plan->bias_warps = static_cast<int>(divide_up(query_units, divide_up(query_units, kBiasMaxWarps)));
  while (bias_shared_bytes<D>(plan->bias_warps) > limits.shared_per_block && plan->bias_warps > 1) --plan->bias_warps;
  plan->bias_shared = bias_shared_bytes<D>(plan->bias_warps);
  plan->bias_tiles = divide_up(query_units, plan->bias_warps) * (plan->padded / kBiasKeys);
  plan->pad_rows = plan->windows * plan->key_blocks;
  if (plan->qkv_shared > limits.shared_per_block || plan->bias_shared > limits.shared_per_block) {
    return "the gradient needs more shared memory than a block of this device has";
  }
  return nullptr;
}

template <int D>
const char* cut_float(Plan* plan) {
  constexpr int kLanes = D < 16 ? 1 : D / 16;
  plan->row_blocks = static_cast<int>(divide_up(plan->n, kFloatThreads / kLanes));
  plan->bias_tiles = static_cast<int64_t>(plan->padded / kFloatTile) * (plan->padded / kFloatTile);
  plan->pad_rows = plan->windows * plan->row_blocks;
  return nullptr;
}

// The head_dim of the call as a template argument.
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

struct CutFor {
  const SwinAttention& call;
  const DeviceLimits& limits;
  Plan* plan;
  template <int D>
  const char* operator()() const {
    return call.element == kSwinFloat32 ? cut_float<D>(plan) : cut_half<D>(limits, call.heads, plan);
  }
};

const char* make_plan(const SwinAttention& call, Plan* plan) {
  DeviceLimits limits;
  if (const char* error = device_limits(&limits)) return error;
  if (limits.compute_capability < 80) return "the CUDA kernels need compute capability 8.0";
  const int64_t n = product(call.grid.window);
  if (n > kLargestWindow) return "the gradient is for windows of at most 1024 tokens";
  const int64_t windows_a_volume = product(call.grid.counts);
  if (product(call.grid.spatial) >= kPadding) return "a volume of 2^32 - 2 tokens or more";
  if (call.batch * windows_a_volume > INT32_MAX / 64) return "more than 2^25 windows";
  if (call.heads > 65535) return "more than 65535 heads";
  if (bias_table_length(call.grid) > INT32_MAX / 2) return "a bias table of more than 2^30 rows";
  plan->n = static_cast<int>(n);
  plan->padded = static_cast<int>(divide_up(n, kRounding)) * kRounding;
  plan->windows_a_volume = static_cast<int>(windows_a_volume);
  plan->windows = static_cast<int>(call.batch * windows_a_volume);
  if (const char* reason = with_head_dim(call.head_dim, CutFor{call, limits, plan})) return reason;
  // Two blocks a multiprocessor, unless the parts of the bias gradient would take more than 128 MiB.
  const int64_t plane = call.heads * plan->padded * plan->padded * 4;
  int64_t parts = divide_up(2 * limits.multiprocessors, plan->bias_tiles * call.heads);
  if (parts > (int64_t{128} << 20) / plane) parts = (int64_t{128} << 20) / plane;
  if (parts > plan->windows) parts = plan->windows;
  plan->parts = static_cast<int>(parts < 1 ? 1 : parts);
  return nullptr;
}

// Hands out pieces of the workspace, each at a multiple of 256 bytes; with a null base it only adds up.
struct Carver {
  unsigned char* base;
  int64_t used = 0;
  template <class P>
  void take(P** pointer, int64_t count) {
    *pointer = reinterpret_cast<P*>(base == nullptr ? nullptr : base + used);
    used += divide_up(count * static_cast<int64_t>(sizeof(P)), 256) * 256;
  }
};

int64_t carve(const SwinAttention& attention, const Plan& plan, void* workspace, Call* call) {
  const int64_t heads = attention.heads, windows = plan.windows, padded = plan.padded;
  const bool half = attention.element != kSwinFloat32;
  Carver carver{static_cast<unsigned char*>(workspace)};
  carver.take(&call->tokens, plan.windows_a_volume * padded);
  carver.take(&call->seams, plan.windows_a_volume);
  carver.take(&call->rasters, padded);
  const int64_t tile_bytes = attention.element == kSwinFloat16 ? 4 : 2;
  carver.take(&call->tiles, half ? 2 * heads * padded * padded * tile_bytes / 16 : 0);
  carver.take(&call->rows, windows * heads * padded);
  carver.take(&call->planes, heads * plan.parts * padded * padded);
  carver.take(&call->pad_parts, plan.pad_rows * 2 * heads * attention.head_dim);
  carver.take(&call->grad_q_part, half && plan.key_blocks > 1 ? windows * heads * padded * attention.head_dim : 0);
  return carver.used;
}

LaunchGrid blocks_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  LaunchGrid grid;
  grid.x = x, grid.y = y, grid.z = z;
  return grid;
}

template <class T>
struct Passes {
  const Call& call;
  const Plan& plan;
  void* stream;

  template <int D>
  const char* operator()() const {
    const char* error = nullptr;
    const LaunchGrid owners = blocks_of(plan.qkv_blocks, call.heads),
                     tiles = blocks_of(plan.bias_tiles, call.heads, plan.parts);
    if constexpr (sizeof(T) == 4) {
      const LaunchGrid rows = blocks_of(plan.windows, call.heads, plan.row_blocks);
      // Staged rows; then, for keys, the sums of padding tokens.
      const int64_t staged = kFloatChunk * (2 * D * 4 + 8), sums = kFloatThreads * 2 * 4 * (D < 16 ? D : 16);
      error = launch(differentiate_rows_float<D, false>, rows, kFloatThreads, staged, stream, call);
      if (error) return error;
      error =
          launch(differentiate_rows_float<D, true>, rows, kFloatThreads, staged > sums ? staged : sums, stream, call);
      if (error) return error;
      return launch(differentiate_bias_float<D>, tiles, 256, 4 * kFloatTile * (D + 4) * 4, stream, call);
    } else {
      error = launch(differentiate_qkv<T, D>, owners, plan.key_warps * 32, plan.qkv_shared, stream, call,
                     plan.key_blocks, plan.query_block);
      if (error) return error;
      return launch(differentiate_bias<T, D>, tiles, plan.bias_warps * 32, plan.bias_shared, stream, call);
    }
  }
};

// The gradient of qkv, and the planes whose sums are the gradient of the table.
template <class T>
const char* differentiate_windows(const Call& call, const Plan& plan, void* stream) {
  const int64_t padded = call.padded;
  const auto threads = [](int64_t count) { return blocks_of(divide_up(count, 256)); };
  const char* error = launch(find_tokens, threads(call.windows_a_volume * padded), 256, 0, stream, call);
  if (error) return error;
  if constexpr (sizeof(T) == 2) {
    error = launch(prepare_bias<T>, threads(call.heads * padded * padded / 4), 256, 0, stream, call);
    if (error) return error;
  }
  error = launch(prepare_rows<T>, threads(call.windows * padded * call.heads), 256, 0, stream, call);
  if (error) return error;
  error = with_head_dim(call.head_dim, Passes<T>{call, plan, stream});
  if (error || plan.parts == 1) return error;
  return launch(sum_planes, blocks_of(divide_up(padded * padded, 256), call.heads), 256, 0, stream, call);
}

template <class T>
const char* differentiate(const Call& call, const Plan& plan, void* stream) {
  const char* error = call.windows > 0 ? differentiate_windows<T>(call, plan, stream) : nullptr;
  if (error) return error;
  const int64_t entries = divide_up(bias_table_length(call.grid), 8);
  error = launch(reduce_to_table<T>, blocks_of(entries, call.heads), 256, 0, stream, call);
  if (error) return error;
  const int64_t columns = divide_up(3 * static_cast<int64_t>(call.heads) * call.head_dim, kPadColumns);
  return launch(reduce_padding<T>, blocks_of(columns), kPadColumns * kPadGroups, kPadColumns * kPadGroups * 4, stream,
                call);
}

}  // namespace
}  // namespace swin

const char* swin_cuda_attention_backward_declines(const SwinAttention* call) {
  swin::Plan plan{};
  return swin::make_plan(*call, &plan);
}

int64_t swin_cuda_attention_backward_workspace_bytes(const SwinAttention* call) {
  swin::Plan plan{};
  swin::Call unused{};
  return swin::make_plan(*call, &plan) == nullptr ? swin::carve(*call, plan, nullptr, &unused) : 0;
}

const char* swin_cuda_attention_backward(const SwinAttention* attention, const SwinAttentionBackward* tensors,
                                         void* workspace, void* stream) {
  swin::Plan plan{};
  if (const char* reason = swin::make_plan(*attention, &plan)) return reason;
  swin::Call call{};
  swin::carve(*attention, plan, workspace, &call);
  call.grid = attention->grid;
  call.volume_tokens = swin::product(call.grid.spatial);
  call.windows_a_volume = plan.windows_a_volume, call.windows = plan.windows;
  call.heads = static_cast<int>(attention->heads), call.head_dim = static_cast<int>(attention->head_dim);
  call.n = plan.n, call.padded = plan.padded;
  call.float_table = attention->bias_element == kSwinFloat32;
  for (int axis = 0; axis < swin::kAxes; ++axis) {
    call.has_padding |= call.grid.counts[axis] * call.grid.window[axis] != call.grid.spatial[axis];
  }
  call.scale = static_cast<float>(attention->scale);
  call.grad_out = tensors->grad_out, call.qkv = tensors->qkv, call.bias_table = tensors->bias_table;
  call.pad_qkv = tensors->pad_qkv, call.out = tensors->out, call.lse = tensors->lse;
  call.grad_qkv = tensors->grad_qkv, call.grad_bias_table = tensors->grad_bias_table;
  call.grad_pad_qkv = tensors->grad_pad_qkv;
  call.parts = plan.parts, call.pad_rows = call.has_padding ? plan.pad_rows : 0;
  switch (attention->element) {
    case kSwinFloat32: return swin::differentiate<float>(call, plan, stream);
    case kSwinBFloat16: return swin::differentiate<swin::BFloat16>(call, plan, stream);
    case kSwinFloat16: return swin::differentiate<swin::Float16>(call, plan, stream);
  }
  return "window_attention_backward: unknown element type";
}
