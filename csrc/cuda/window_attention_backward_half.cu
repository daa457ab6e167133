// The gradient of window attention in 16 bits, passes 1 to 3 of window_attention_backward.h.
#include "cuda/window_attention_backward.h"

namespace swin {
namespace {

// ---- 1. bias tiles --------------------------------------------------------------------------------------------------

SWIN_DEVICE int64_t tile_offset(const BackwardCall& call, int orientation, int head, int row_tile, int column_tile) {
  const int64_t side = call.padded / kTile;
  return (((orientation * call.heads + head) * side + row_tile) * side + column_tile) * 32 + lane_index();
}

// Bias tiles, first with keys in rows for differentiate_qkv, then with queries in rows for differentiate_bias. A warp
// writes one tile.
template <class T>
__global__ void __launch_bounds__(256) prepare_bias(const BackwardCall call) {
  const int64_t tile = thread_of_grid() / 32;
  const int side = call.padded / kTile;
  if (tile >= static_cast<int64_t>(2) * call.heads * side * side) return;
  const int column_tile = static_cast<int>(tile % side), row_tile = static_cast<int>(tile / side % side);
  const int head = static_cast<int>(tile / side / side % call.heads);
  const bool keys_down = tile < static_cast<int64_t>(call.heads) * side * side;
  call.tiles[tile * 32 + lane_index()] = bias_tile<T>(call, head, row_tile, column_tile, keys_down);
}

// ---- 2. gradients of q, k and v -------------------------------------------------------------------------------------

// What a warp of `differentiate_qkv` owns: as many keys as the registers of a thread hold.
template <int D>
struct Own {
  static constexpr int kKeyTiles = D <= 16 ? 3 : D <= 32 ? 2 : 1;
  static constexpr int kWarpKeys = kKeyTiles * kTile;
  static constexpr int kMaxWarps = 8;  // so that a thread may have 255 registers
};

// Scores (over scale, without bias) of a warp's keys for 16 queries, added to s, and their dp - delta.
template <class T, int D>
SWIN_DEVICE void score_queries(const uint32_t (&k)[Own<D>::kKeyTiles][Cut<D>::kSteps][4],
                               const uint32_t (&v)[Own<D>::kKeyTiles][Cut<D>::kSteps][4], const T* q_rows,
                               const T* grad_rows, float (&delta)[2][4], float (&s)[Own<D>::kKeyTiles][2][4],
                               float (&dp)[Own<D>::kKeyTiles][2][4]) {
  SWIN_UNROLL
  for (int depth = 0; depth < Cut<D>::kSteps; ++depth) {
    uint32_t q_tile[4], grad_tile[4];
    ldmatrix_x4(q_tile, q_rows + depth * kTile);
    ldmatrix_x4(grad_tile, grad_rows + depth * kTile);
    SWIN_UNROLL
    for (int tile = 0; tile < Own<D>::kKeyTiles; ++tile) {
      SWIN_UNROLL
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<T>(s[tile][half], k[tile][depth], q_tile[2 * half], q_tile[2 * half + 1], s[tile][half]);
        mma_m16n8k16<T>(dp[tile][half], v[tile][depth], grad_tile[2 * half], grad_tile[2 * half + 1],
                        depth == 0 ? delta[half] : dp[tile][half]);
      }
    }
  }
}

// Lowers the scores of the keys from `own` on for the queries from `first_query` on where their regions differ; keys
// beyond the window get no weight.
template <int D>
SWIN_DEVICE void mask_queries(const BackwardCall& call, const Window& window,
                              const uint32_t (&region)[Own<D>::kKeyTiles][2], int own, int first_query, float mask,
                              float absent, float (&s)[Own<D>::kKeyTiles][2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SWIN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int query = first_query + half * 8 + 2 * t;
    const auto entry = *reinterpret_cast<const uint4*>(window.tokens + query);  // and of query + 1
    SWIN_UNROLL
    for (int i = 0; i < 4 * Own<D>::kKeyTiles; ++i) {
      const int tile = i / 4, lower = i / 2 % 2;
      const bool masked = window.seam && (i % 2 == 0 ? entry.y : entry.w) != region[tile][lower];
      if (masked) s[tile][half][i % 4] += mask;
      if (own + tile * kTile + lower * 8 + g >= call.n) s[tile][half][i % 4] = absent;
    }
  }
}

// p and ds as left factors; ds also goes to its rows in shared memory. `factor` makes scores powers of two.
template <class T, int kTiles>
SWIN_DEVICE void weigh(const float (&s)[kTiles][2][4], const float (&dp)[kTiles][2][4], const float (&lse)[2][2],
                       float factor, T* ds_rows, int ds_stride, uint32_t (&p_tile)[kTiles][4],
                       uint32_t (&ds_tile)[kTiles][4]) {
  SWIN_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    SWIN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float p[4], ds[4];
      SWIN_UNROLL
      for (int i = 0; i < 4; ++i) {
        p[i] = exp2_approx(fmaf(s[tile][half][i], factor, -lse[half][i % 2]));
        ds[i] = p[i] * dp[tile][half][i];
      }
      p_tile[tile][2 * half] = pack<T>(p[0], p[1]), p_tile[tile][2 * half + 1] = pack<T>(p[2], p[3]);
      ds_tile[tile][2 * half] = pack<T>(ds[0], ds[1]), ds_tile[tile][2 * half + 1] = pack<T>(ds[2], ds[3]);
      T* const at = ds_rows + tile * kTile * ds_stride + half * 8;
      store_shared(reinterpret_cast<uint32_t*>(at), ds_tile[tile][2 * half]);
      store_shared(reinterpret_cast<uint32_t*>(at + 8 * ds_stride), ds_tile[tile][2 * half + 1]);
    }
  }
}

// dv += p grad_out and dk += ds q of 16 queries.
template <class T, int D>
SWIN_DEVICE void add_queries(const uint32_t (&p_tile)[Own<D>::kKeyTiles][4],
                             const uint32_t (&ds_tile)[Own<D>::kKeyTiles][4], const T* q_rows, const T* grad_rows,
                             float (&grad_k)[Own<D>::kKeyTiles][Cut<D>::kColumns][4],
                             float (&grad_v)[Own<D>::kKeyTiles][Cut<D>::kColumns][4]) {
  using C = Cut<D>;
  SWIN_UNROLL
  for (int pair = 0; pair < C::kPairs; ++pair) {
    uint32_t q_tile[4], grad_tile[4];
    ldmatrix_x4_trans(q_tile, q_rows + pair * kTile);
    ldmatrix_x4_trans(grad_tile, grad_rows + pair * kTile);
    SWIN_UNROLL
    for (int column = 2 * pair; column < 2 * pair + 2 && column < C::kColumns; ++column) {
      const int b = column % 2 * 2;
      SWIN_UNROLL
      for (int tile = 0; tile < Own<D>::kKeyTiles; ++tile) {
        mma_m16n8k16<T>(grad_v[tile][column], p_tile[tile], grad_tile[b], grad_tile[b + 1], grad_v[tile][column]);
        mma_m16n8k16<T>(grad_k[tile][column], ds_tile[tile], q_tile[b], q_tile[b + 1], grad_k[tile][column]);
      }
    }
  }
}

// ds^T k of 16 queries and up to 16 channels, over `key_steps` tiles of keys. As many chains of products as tiles of a
// warp, to hide latency.
template <class T, int D>
SWIN_DEVICE void sum_over_keys(const T* ds_rows, int ds_stride, const T* k_rows, int key_steps, int pair,
                               float (&sums)[Own<D>::kKeyTiles][2][4]) {
  using C = Cut<D>;
  constexpr int kTiles = Own<D>::kKeyTiles;
  SWIN_NO_UNROLL
  for (int key_step = 0; key_step < key_steps; key_step += kTiles) {
    SWIN_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      uint32_t ds_tile[4], k_columns[4];
      ldmatrix_x4_trans(ds_tile, ds_rows + tile * kTile * ds_stride);
      ldmatrix_x4_trans(k_columns, k_rows + tile * kTile * C::kStride);
      SWIN_UNROLL
      for (int column = 0; column < 2 && 2 * pair + column < C::kColumns; ++column) {
        mma_m16n8k16<T>(sums[tile][column], ds_tile, k_columns[2 * column], k_columns[2 * column + 1],
                        sums[tile][column]);
      }
    }
    ds_rows += kTiles * kTile * ds_stride, k_rows += kTiles * kTile * C::kStride;
  }
}

// dq of the queries from `first_query` on for a pair of columns. The blocks of keys of a window hand its sums on to one
// another; the last one stores them.
template <class T, int D>
SWIN_DEVICE void store_query_gradients(const BackwardCall& call, const Window& window, int window_index, int head,
                                       int key_block, int key_blocks, uint32_t channels, int first_query, int pair,
                                       T* grad_qkv, const float (&sums)[Own<D>::kKeyTiles][2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SWIN_UNROLL
  for (int column = 0; column < 2 && 2 * pair + column < Cut<D>::kColumns; ++column) {
    SWIN_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int query = first_query + lower * 8 + g, channel = (2 * pair + column) * 8;
      const uint32_t token = window.tokens[query].x;
      if (token >= kPadding) continue;  // it has no output, so its q has no gradient
      float2 value = make_float2(0, 0);
      SWIN_UNROLL
      for (int tile = 0; tile < Own<D>::kKeyTiles; ++tile) {
        value.x += sums[tile][column][2 * lower], value.y += sums[tile][column][2 * lower + 1];
      }
      if (key_blocks > 1) {  // the same thread adds to the same elements in every block of keys
        const int64_t row = (static_cast<int64_t>(window_index) * call.heads + head) * call.padded + query;
        float2* const part = reinterpret_cast<float2*>(call.grad_q_part + row * D + channel + 2 * t);
        if (key_block > 0) value = make_float2(value.x + part->x, value.y + part->y);
        if (key_block < key_blocks - 1) {
          *part = value;
          continue;
        }
      }
      *reinterpret_cast<uint32_t*>(grad_qkv + uint64_t{token} * (3 * channels) + channel) =
          pack<T>(value.x * call.scale, value.y * call.scale);
    }
  }
}

// dk and dv of a warp's keys from `own` on; those of padding tokens are added to pad_sum (k and v, channels 2t and 2t +
// 1 of each column block).
template <class T, int D>
SWIN_DEVICE void store_key_gradients(const BackwardCall& call, const Window& window,
                                     const float (&grad_k)[Own<D>::kKeyTiles][Cut<D>::kColumns][4],
                                     const float (&grad_v)[Own<D>::kKeyTiles][Cut<D>::kColumns][4], uint32_t channels,
                                     int own, T* grad_qkv, float (&pad_sum)[2][Cut<D>::kColumns][2]) {
  SWIN_UNROLL
  for (int tile = 0; tile < Own<D>::kKeyTiles; ++tile) {
    SWIN_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const int key = own + tile * kTile + lower * 8 + lane_index() / 4;
      const uint32_t token = key < call.n ? window.tokens[key].x : kAbsent;
      T* const at = grad_qkv + uint64_t{token < kPadding ? token : 0} * (3 * channels);
      SWIN_UNROLL
      for (int column = 0; column < Cut<D>::kColumns; ++column) {
        const float dk[2] = {grad_k[tile][column][2 * lower] * call.scale,
                             grad_k[tile][column][2 * lower + 1] * call.scale};
        const float dv[2] = {grad_v[tile][column][2 * lower], grad_v[tile][column][2 * lower + 1]};
        if (token < kPadding) {
          *reinterpret_cast<uint32_t*>(at + channels + column * 8) = pack<T>(dk[0], dk[1]);
          *reinterpret_cast<uint32_t*>(at + 2 * channels + column * 8) = pack<T>(dv[0], dv[1]);
        } else if (token == kPadding) {
          pad_sum[0][column][0] += dk[0], pad_sum[0][column][1] += dk[1];
          pad_sum[1][column][0] += dv[0], pad_sum[1][column][1] += dv[1];
        }
      }
    }
  }
}

// The sums of a block's warps of what padding tokens carry, by way of `sums` (warps, 2, D) in shared memory.
template <int D>
SWIN_DEVICE void store_padding(const BackwardCall& call, const Window& window, int window_index, int head,
                               int key_block, int key_blocks, uint32_t channels,
                               const float (&pad_sum)[2][Cut<D>::kColumns][2], float* sums) {
  const int warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int g = lane_index() / 4, t = lane_index() % 4;
  if (window.padded) {
    SWIN_UNROLL
    for (int i = 0; i < 4 * Cut<D>::kColumns; ++i) {
      const int part = i / (2 * Cut<D>::kColumns), column = i / 2 % Cut<D>::kColumns, channel = i % 2;
      float sum = pad_sum[part][column][channel];
      for (int distance = 4; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
      if (g == 0) store_shared(sums + (warp * 2 + part) * D + column * 8 + 2 * t + channel, sum);
    }
    block_barrier();
  }
  if (call.has_padding) {
    for (int i = static_cast<int>(threadIdx.x); i < 2 * D; i += static_cast<int>(blockDim.x)) {
      float sum = 0;
      for (int from = 0; from < (window.padded ? warps : 0); ++from) sum += load_shared(sums + from * 2 * D + i);
      const int64_t row = static_cast<int64_t>(window_index) * key_blocks + key_block;
      call.pad_parts[row * 2 * channels + i / D * channels + head * D + i % D] = sum;
    }
  }
  if (window.padded) block_barrier();  // the sums may be overwritten
}

// A block owns one head and every gridDim.x-th window; while it works on one, the next is on its way into shared
// memory. A warp owns kWarpKeys keys at a time, whose k and v stay in its registers, as do the sums for dk and dv;
// queries pass by in blocks. Score tiles have keys in rows: the mma leaves p and ds in the layout of the left factors
// of dv += p grad_out and dk += ds q. dq needs the sum over all keys, so the warps put ds into shared memory, and each
// then multiplies some tiles of ds^T k.
template <class T, int D>
__global__ void __launch_bounds__(32 * Own<D>::kMaxWarps)
    differentiate_qkv(const BackwardCall call, const int key_blocks, const int query_block) {
  using C = Cut<D>;
  constexpr int kTiles = Own<D>::kKeyTiles, kWarpKeys = Own<D>::kWarpKeys;
  const int lane = lane_index(), warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.y), stride = static_cast<int>(gridDim.x);
  const int block_keys = warps * kWarpKeys, ds_stride = query_block + 8;
  const int tile_row = call.padded / kTile * 32;
  const auto channels = static_cast<uint32_t>(call.heads * D);
  const float factor = call.scale * kLog2E, mask = kMask / call.scale, absent = -kInfinity * call.scale;
  const Diagonal diagonal = diagonal_of(1.0f / call.scale);
  const Share<D> share = own_share<D>();
  const int down = kept(down_first(lane, C::kStride)), across = kept(across_first(lane, C::kStride));

  T* const all_k_rows = reinterpret_cast<T*>(shared_memory());     // (2, block_keys, kStride)
  T* const all_v_rows = all_k_rows + 2 * block_keys * C::kStride;  // (2, block_keys, kStride)
  T* const q_rows = all_v_rows + 2 * block_keys * C::kStride;      // (2, query_block, kStride)
  T* const grad_rows = q_rows + 2 * query_block * C::kStride;      // (2, query_block, kStride)
  T* const ds_rows = grad_rows + 2 * query_block * C::kStride;     // (block_keys, ds_stride): keys in rows
  float2* const row_rows = reinterpret_cast<float2*>(ds_rows + block_keys * ds_stride);  // (2, query_block)

  const auto stage_next_keys = [&](const Window& window, int key_block, int buffer) {
    const int first = key_block * block_keys, at = buffer * block_keys * C::kStride;
    stage_keys<T, D>(call, share, window, head, first, first + block_keys, all_k_rows + at, all_v_rows + at);
  };
  const auto stage_next_queries = [&](const Window& window, int window_index, int first, int buffer) {
    const int count = query_block < call.padded - first ? query_block : call.padded - first;
    const int at = buffer * query_block;
    stage_queries<T, D>(share, window, head, first, first + count, call.qkv, 3 * channels, q_rows + at * C::kStride);
    stage_queries<T, D>(share, window, head, first, first + count, call.grad_out, channels,
                        grad_rows + at * C::kStride);
    stage_rows(row_rows + at, rows_of(call, window_index, head) + first, count);
    cp_async_commit();
  };

  int window_index = static_cast<int>(blockIdx.x), key_block = 0;
  int buffer = 0;  // of the queries
  Window window = window_at(call, window_index);
  stage_next_keys(window, 0, 0);
  stage_next_queries(window, window_index, 0, 0);
  cp_async_wait<0>();
  block_barrier();
  for (int key_buffer = 0; window_index < call.windows; key_buffer ^= 1) {
    const int next_key_block = key_block + 1 < key_blocks ? key_block + 1 : 0;
    const int next_window_index = next_key_block > 0 ? window_index : window_index + stride;
    const bool ends = next_window_index >= call.windows;
    const Window next_window = next_key_block > 0 || ends ? window : window_behind(call, window, stride);
    T* const grad_qkv = static_cast<T*>(call.grad_qkv) + window.first * (3 * channels) + head * D + 2 * t;
    const T* const k_rows = all_k_rows + key_buffer * block_keys * C::kStride;
    const T* const v_rows = all_v_rows + key_buffer * block_keys * C::kStride;
    const int first_key = key_block * block_keys, own = first_key + warp * kWarpKeys;
    const int left = call.n - first_key, keys = block_keys < left ? block_keys : left;
    const int key_steps = (keys + kTile - 1) / kTile;  // of ds^T k
    const bool active = own < call.n;                  // the same for a whole warp
    const bool ragged = own + kWarpKeys > call.n;

    uint32_t k_tile[kTiles][C::kSteps][4], v_tile[kTiles][C::kSteps][4];
    uint32_t region[kTiles][2];
    float grad_k[kTiles][C::kColumns][4] = {}, grad_v[kTiles][C::kColumns][4] = {};
    if (active) {
      SWIN_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = (warp * kTiles + tile) * kTile;
        SWIN_UNROLL
        for (int step = 0; step < C::kSteps; ++step) {
          ldmatrix_x4(k_tile[tile][step], k_rows + row * C::kStride + step * kTile + down);
          ldmatrix_x4(v_tile[tile][step], v_rows + row * C::kStride + step * kTile + down);
        }
        SWIN_UNROLL
        for (int lower = 0; lower < 2; ++lower) {
          const int key = own + tile * kTile + lower * 8 + g;
          region[tile][lower] = key < call.padded ? window.tokens[key].y : 0;
        }
      }
    }

    for (int first = 0; first < call.n; first += query_block, buffer ^= 1) {
      if (first + query_block < call.n) {
        stage_next_queries(window, window_index, first + query_block, buffer ^ 1);
      } else if (!ends) {
        stage_next_keys(next_window, next_key_block, key_buffer ^ 1);
        stage_next_queries(next_window, next_window_index, 0, buffer ^ 1);
      }
      const int queries = call.n - first < query_block ? call.n - first : query_block;
      const int steps = (queries + kTile - 1) / kTile;
      if (active) {
        const T* q_across = q_rows + buffer * query_block * C::kStride + across;
        const T* q_down = q_rows + buffer * query_block * C::kStride + down;
        const T* grad_across = grad_rows + buffer * query_block * C::kStride + across;
        const T* grad_down = grad_rows + buffer * query_block * C::kStride + down;
        const float2* row_at = row_rows + buffer * query_block + 2 * t;
        T* ds_at = ds_rows + (warp * kWarpKeys + g) * ds_stride + 2 * t;
        // Rows of tiles beyond the padded keys do not exist; since their weights become zero, any tile's bias will do.
        const uint4* tile_at = call.tiles + tile_offset(call, 0, head, own / kTile, first / kTile);
        const int last_tile = (call.padded - 1 - own) / kTile;
        uint4 bias[kTiles];  // of a step, loaded during the step before
        SWIN_UNROLL
        for (int tile = 0; tile < kTiles; ++tile)
          bias[tile] = tile_at[(tile < last_tile ? tile : last_tile) * tile_row];
        SWIN_NO_UNROLL
        for (int step = 0; step < steps; ++step) {
          float s[kTiles][2][4] = {}, dp[kTiles][2][4], delta[2][4];
          float lse[2][2];  // times log2(e), of queries 2t and 2t + 1 of both halves of the tile
          SWIN_UNROLL
          for (int half = 0; half < 2; ++half) {
            const float4 two = load_shared(reinterpret_cast<const float4*>(row_at + half * 8));
            lse[half][0] = two.x, lse[half][1] = two.z;
            delta[half][0] = delta[half][2] = two.y, delta[half][1] = delta[half][3] = two.w;
          }
          score_queries<T, D>(k_tile, v_tile, q_across, grad_across, delta, s, dp);
          tile_at += step + 1 < steps ? 32 : 0;
          SWIN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) add_bias(s[tile], bias[tile], diagonal.most);
          if (!diagonal.exact) {
            SWIN_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) add_bias(s[tile], bias[tile], diagonal.rest);
          }
          SWIN_UNROLL
          for (int tile = 0; tile < kTiles; ++tile) {
            bias[tile] = tile_at[(tile < last_tile ? tile : last_tile) * tile_row];
          }
          if (window.seam || ragged) mask_queries<D>(call, window, region, own, first + step * kTile, mask, absent, s);

          uint32_t p_tile[kTiles][4], ds_tile[kTiles][4];
          weigh<T>(s, dp, lse, factor, ds_at, ds_stride, p_tile, ds_tile);
          add_queries<T, D>(p_tile, ds_tile, q_down, grad_down, grad_k, grad_v);
          q_across += kTile * C::kStride, q_down += kTile * C::kStride;
          grad_across += kTile * C::kStride, grad_down += kTile * C::kStride;
          row_at += kTile, ds_at += kTile;
        }
      }
      block_barrier();  // ds of this block of queries is complete

      for (int unit = warp; unit < steps * C::kPairs; unit += warps) {
        const int step = unit / C::kPairs, pair = unit % C::kPairs;
        float sums[kTiles][2][4] = {};
        sum_over_keys<T, D>(ds_rows + step * kTile + across_first(lane, ds_stride), ds_stride,
                            k_rows + pair * kTile + down, key_steps, pair, sums);
        store_query_gradients<T, D>(call, window, window_index, head, key_block, key_blocks, channels,
                                    first + step * kTile, pair, grad_qkv, sums);
      }
      cp_async_wait<0>();
      block_barrier();  // the next queries (and keys) have arrived, ds may be overwritten
    }

    float pad_sum[2][C::kColumns][2] = {};  // of k and v, channels 2t and 2t + 1 of each column block
    if (active) store_key_gradients<T, D>(call, window, grad_k, grad_v, channels, own, grad_qkv, pad_sum);
    store_padding<D>(call, window, window_index, head, key_block, key_blocks, channels, pad_sum,
                     reinterpret_cast<float*>(ds_rows));
    window = next_window, window_index = next_window_index, key_block = next_key_block;
  }
}

// ---- delta and gradient of the bias: queries in rows ----------------------------------------------------------------

constexpr int kBiasKeys = 64;  // of a block
constexpr int kBiasWarpQueries = 32;
constexpr int kBiasMaxWarps = 6;
constexpr int kBiasTiles = kBiasWarpQueries / kTile;

// What a warp holds of its kBiasWarpQueries queries: left factors, lse, and the -delta that dp accumulates from.
template <int D>
struct QueryRows {
  uint32_t q[kBiasTiles][Cut<D>::kSteps][4], grad[kBiasTiles][Cut<D>::kSteps][4];
  float lse[kBiasTiles][2], delta[kBiasTiles][4];
};

// From shared memory; q and grad_out at the fragment of the lane.
template <class T, int D>
SWIN_DEVICE void load_queries(const T* q_rows, const T* grad_rows, const float2* row_rows, QueryRows<D>* rows) {
  using C = Cut<D>;
  SWIN_UNROLL
  for (int tile = 0; tile < kBiasTiles; ++tile) {
    SWIN_UNROLL
    for (int step = 0; step < C::kSteps; ++step) {
      const int at = tile * kTile * C::kStride + step * kTile;
      ldmatrix_x4(rows->q[tile][step], q_rows + at);
      ldmatrix_x4(rows->grad[tile][step], grad_rows + at);
    }
    SWIN_UNROLL
    for (int lower = 0; lower < 2; ++lower) {
      const float2 row = load_shared(row_rows + tile * kTile + lower * 8 + lane_index() / 4);
      rows->lse[tile][lower] = row.x, rows->delta[tile][2 * lower] = rows->delta[tile][2 * lower + 1] = row.y;
    }
  }
}

// Scores (over scale) of a warp's queries for 16 keys, added to s, and their dp - delta.
template <class T, int D>
SWIN_DEVICE void score_keys(QueryRows<D>& rows, const T* k_rows, const T* v_rows, const uint4* bias_tiles, int tile_row,
                            const Diagonal& diagonal, float (&s)[kBiasTiles][2][4], float (&dp)[kBiasTiles][2][4]) {
  using C = Cut<D>;
  uint4 bias[kBiasTiles];
  SWIN_UNROLL
  for (int tile = 0; tile < kBiasTiles; ++tile) bias[tile] = bias_tiles[tile * tile_row];
  SWIN_UNROLL
  for (int step = 0; step < C::kSteps; ++step) {
    uint32_t k_tile[4], v_tile[4];
    ldmatrix_x4(k_tile, k_rows + step * kTile);
    ldmatrix_x4(v_tile, v_rows + step * kTile);
    SWIN_UNROLL
    for (int tile = 0; tile < kBiasTiles; ++tile) {
      SWIN_UNROLL
      for (int half = 0; half < 2; ++half) {
        mma_m16n8k16<T>(s[tile][half], rows.q[tile][step], k_tile[2 * half], k_tile[2 * half + 1], s[tile][half]);
        mma_m16n8k16<T>(dp[tile][half], rows.grad[tile][step], v_tile[2 * half], v_tile[2 * half + 1],
                        step == 0 ? rows.delta[tile] : dp[tile][half]);
      }
    }
  }
  SWIN_UNROLL
  for (int tile = 0; tile < kBiasTiles; ++tile) add_bias(s[tile], bias[tile], diagonal.most);
  if (!diagonal.exact) {
    SWIN_UNROLL
    for (int tile = 0; tile < kBiasTiles; ++tile) add_bias(s[tile], bias[tile], diagonal.rest);
  }
}

// Lowers the scores of the queries from `own` on for the keys from `first_key` on where their regions differ.
SWIN_DEVICE void mask_keys(const Window& window, int own, int first_key, float mask, float (&s)[kBiasTiles][2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SWIN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const auto entry = *reinterpret_cast<const uint4*>(window.tokens + first_key + half * 8 + 2 * t);  // and the next
    SWIN_UNROLL
    for (int i = 0; i < 4 * kBiasTiles; ++i) {
      const uint32_t query_region = window.tokens[own + i / 4 * kTile + i / 2 % 2 * 8 + g].y;
      if ((i % 2 == 0 ? entry.y : entry.w) != query_region) s[i / 4][half][i % 4] += mask;
    }
  }
}

// A block owns one head and a tile of queries in every gridDim.z-th window, whose keys pass by kBiasKeys at a time; a
// warp owns 32 queries. The weights of a query are also summed: the rounding of a large lse scales all of them.
template <class T, int D>
__global__ void __launch_bounds__(32 * kBiasMaxWarps, D <= 16 ? 2 : 1) find_delta(const BackwardCall call) {
  using C = Cut<D>;
  constexpr int kTiles = kBiasTiles, kKeyTiles = kBiasKeys / kTile;
  const int lane = lane_index(), warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.y), block_queries = warps * kBiasWarpQueries;
  const int first_query = static_cast<int>(blockIdx.x) * block_queries;
  const int left = call.padded - first_query, queries = block_queries < left ? block_queries : left;
  const int own = first_query + warp * kBiasWarpQueries;
  const bool active = own < call.n;
  const auto channels = static_cast<uint32_t>(call.heads * D);
  const int tile_row = call.padded / kTile * 32;
  const uint4* const bias_tiles = call.tiles + tile_offset(call, 1, head, active ? own / kTile : 0, 0);
  const float factor = call.scale * kLog2E, mask = kMask / call.scale, absent = -kInfinity * call.scale;
  const Diagonal diagonal = diagonal_of(1.0f / call.scale);
  const Share<D> share = own_share<D>();
  const int down = kept(down_first(lane, C::kStride)), across = kept(across_first(lane, C::kStride));

  T* const q_rows = reinterpret_cast<T*>(shared_memory());       // (2, block_queries, kStride)
  T* const grad_rows = q_rows + 2 * block_queries * C::kStride;  // (2, block_queries, kStride)
  T* const k_rows = grad_rows + 2 * block_queries * C::kStride;  // (2, kBiasKeys, kStride)
  T* const v_rows = k_rows + 2 * kBiasKeys * C::kStride;         // (2, kBiasKeys, kStride)
  float2* const row_rows = reinterpret_cast<float2*>(v_rows + 2 * kBiasKeys * C::kStride);  // (2, block_queries)

  const auto stage_query_rows = [&](const Window& window, int window_index, int buffer) {
    const int at = buffer * block_queries * C::kStride;
    stage_queries<T, D>(share, window, head, first_query, first_query + queries, call.qkv, 3 * channels, q_rows + at);
    stage_queries<T, D>(share, window, head, first_query, first_query + queries, call.grad_out, channels,
                        grad_rows + at);
    stage_rows(row_rows + buffer * block_queries, rows_of(call, window_index, head) + first_query, queries);
  };
  const auto stage_key_rows = [&](const Window& window, int first_key, int buffer) {
    const int at = buffer * kBiasKeys * C::kStride;
    stage_keys<T, D>(call, share, window, head, first_key, first_key + kBiasKeys, k_rows + at, v_rows + at);
  };

  const int stride = static_cast<int>(gridDim.z), begin = static_cast<int>(blockIdx.z);
  Window window = window_at(call, begin);
  stage_query_rows(window, begin, 0);
  stage_key_rows(window, 0, 0);
  cp_async_commit();
  int key_buffer = 0;
  for (int index = begin, buffer = 0; index < call.windows; index += stride, buffer ^= 1) {
    const Window here = window;
    QueryRows<D> rows;
    float total[kTiles][2] = {}, product[kTiles][2] = {};  // of p and of p dp
    SWIN_NO_UNROLL
    for (int first_key = 0; first_key < call.n; first_key += kBiasKeys, key_buffer ^= 1) {
      cp_async_wait<0>();
      block_barrier();  // these keys have arrived, and no thread reads the other buffers any more
      if (first_key + kBiasKeys < call.n) {
        stage_key_rows(here, first_key + kBiasKeys, key_buffer ^ 1);
      } else if (index + stride < call.windows) {
        window = window_behind(call, here, stride);
        stage_query_rows(window, index + stride, buffer ^ 1);
        stage_key_rows(window, 0, key_buffer ^ 1);
      }
      cp_async_commit();
      if (!active) continue;
      if (first_key == 0) {
        const int at = (buffer * block_queries + warp * kBiasWarpQueries) * C::kStride + down;
        load_queries<T, D>(q_rows + at, grad_rows + at, row_rows + buffer * block_queries + warp * kBiasWarpQueries,
                           &rows);
      }
      const int key_row = key_buffer * kBiasKeys * C::kStride + across;
      SWIN_UNROLL
      for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
        const int first = first_key + key_tile * kTile;
        if (first >= call.n) break;
        float s[kTiles][2][4] = {}, dp[kTiles][2][4];
        const int at = key_row + key_tile * kTile * C::kStride;
        score_keys<T, D>(rows, k_rows + at, v_rows + at, bias_tiles + first / kTile * 32, tile_row, diagonal, s, dp);
        if (here.seam) mask_keys(here, own, first, mask, s);
        if (first + kTile > call.n) {
          SWIN_UNROLL
          for (int i = 0; i < 8 * kTiles; ++i) {
            if (first + i / 4 % 2 * 8 + 2 * t + i % 2 >= call.n) s[i / 8][i / 4 % 2][i % 4] = absent;
          }
        }
        SWIN_UNROLL
        for (int i = 0; i < 8 * kTiles; ++i) {
          const int tile = i / 8, half = i / 4 % 2, lower = i / 2 % 2;
          const float p = exp2_approx(fmaf(s[tile][half][i % 4], factor, -rows.lse[tile][lower]));
          total[tile][lower] += p;
          product[tile][lower] = fmaf(p, dp[tile][half][i % 4], product[tile][lower]);
        }
      }
    }
    if (!active) continue;
    SWIN_UNROLL
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int query = own + i / 2 * kTile + i % 2 * 8 + g;
      const float sum = quad_sum(total[i / 2][i % 2]), delta = quad_sum(product[i / 2][i % 2]) / sum;
      // A query without output has no weights.
      if (t == 0 && query < call.padded && sum != 0) {
        call.rows[(static_cast<int64_t>(index) * call.heads + head) * call.padded + query].y = -delta;
      }
    }
  }
}

// ---- 3. gradient of the bias ----------------------------------------------------------------------------------------

// ds of a warp's queries and 16 keys, added to `total`.
SWIN_DEVICE void add_score_gradients(const float (&s)[kBiasTiles][2][4], const float (&dp)[kBiasTiles][2][4],
                                     const float (&lse)[kBiasTiles][2], float factor, int key_tile,
                                     float (&total)[kBiasTiles][kBiasKeys / kTile][2][4]) {
  SWIN_UNROLL
  for (int i = 0; i < 8 * kBiasTiles; ++i) {
    const int tile = i / 8, half = i / 4 % 2;
    const float p = exp2_approx(fmaf(s[tile][half][i % 4], factor, -lse[tile][i / 2 % 2]));
    total[tile][key_tile][half][i % 4] = fmaf(p, dp[tile][half][i % 4], total[tile][key_tile][half][i % 4]);
  }
}

// The sums of a warp's queries, from `own` on, to its part's plane of the bias gradient.
SWIN_DEVICE void store_sums(const BackwardCall& call, int own, int first_key, float* plane,
                            const float (&total)[kBiasTiles][kBiasKeys / kTile][2][4]) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SWIN_UNROLL
  for (int tile = 0; tile < kBiasTiles; ++tile) {
    SWIN_UNROLL
    for (int i = 0; i < 4 * (kBiasKeys / kTile); ++i) {
      const int key_tile = i / 4, half = i / 2 % 2, lower = i % 2;
      const int query = own + tile * kTile + lower * 8 + g, key = first_key + key_tile * kTile + half * 8 + 2 * t;
      if (query >= call.padded) continue;
      const float (&four)[4] = total[tile][key_tile][half];
      *reinterpret_cast<float2*>(plane + static_cast<int64_t>(query) * call.padded + key) =
          make_float2(four[2 * lower], four[2 * lower + 1]);
    }
  }
}

// A block owns one head and a tile of queries x kBiasKeys, and sums ds over every gridDim.z-th window; a warp keeps the
// sums of its 32 queries in registers. Two blocks share a multiprocessor where their registers allow it.
template <class T, int D>
__global__ void __launch_bounds__(32 * kBiasMaxWarps, D <= 16 ? 2 : 1) differentiate_bias(const BackwardCall call) {
  using C = Cut<D>;
  constexpr int kTiles = kBiasTiles, kKeyTiles = kBiasKeys / kTile;
  const int lane = lane_index(), warp = warp_index(), warps = static_cast<int>(blockDim.x / 32);
  const int key_blocks = call.padded / kBiasKeys, head = static_cast<int>(blockIdx.y);
  const int block_queries = warps * kBiasWarpQueries;
  const int first_query = static_cast<int>(blockIdx.x) / key_blocks * block_queries;
  const int first_key = static_cast<int>(blockIdx.x) % key_blocks * kBiasKeys;
  const int left = call.padded - first_query, queries = block_queries < left ? block_queries : left;
  const int own = first_query + warp * kBiasWarpQueries;
  const bool active = own < call.n;
  const auto channels = static_cast<uint32_t>(call.heads * D);
  const int tile_row = call.padded / kTile * 32;
  const uint4* const bias_tiles = call.tiles + tile_offset(call, 1, head, active ? own / kTile : 0, first_key / kTile);
  const float factor = call.scale * kLog2E, mask = kMask / call.scale;
  const Diagonal diagonal = diagonal_of(1.0f / call.scale);
  const Share<D> share = own_share<D>();
  const int down = kept(down_first(lane, C::kStride)), across = kept(across_first(lane, C::kStride));

  T* const q_rows = reinterpret_cast<T*>(shared_memory());       // (2, block_queries, kStride)
  T* const grad_rows = q_rows + 2 * block_queries * C::kStride;  // (2, block_queries, kStride)
  T* const k_rows = grad_rows + 2 * block_queries * C::kStride;  // (2, kBiasKeys, kStride)
  T* const v_rows = k_rows + 2 * kBiasKeys * C::kStride;         // (2, kBiasKeys, kStride)
  float2* const row_rows = reinterpret_cast<float2*>(v_rows + 2 * kBiasKeys * C::kStride);  // (2, block_queries)

  const auto stage_window = [&](const Window& window, int window_index, int buffer) {
    const int query_row = buffer * block_queries * C::kStride, key_row = buffer * kBiasKeys * C::kStride;
    stage_queries<T, D>(share, window, head, first_query, first_query + queries, call.qkv, 3 * channels,
                        q_rows + query_row);
    stage_queries<T, D>(share, window, head, first_query, first_query + queries, call.grad_out, channels,
                        grad_rows + query_row);
    stage_keys<T, D>(call, share, window, head, first_key, first_key + kBiasKeys, k_rows + key_row, v_rows + key_row);
    stage_rows(row_rows + buffer * block_queries, rows_of(call, window_index, head) + first_query, queries);
    cp_async_commit();
  };

  float total[kTiles][kKeyTiles][2][4] = {};
  const int stride = static_cast<int>(gridDim.z), begin = static_cast<int>(blockIdx.z);
  Window window = window_at(call, begin);
  stage_window(window, begin, 0);
  for (int index = begin, buffer = 0; index < call.windows; index += stride, buffer ^= 1) {
    cp_async_wait<0>();
    block_barrier();  // this window has arrived, and no thread reads the other buffer any more
    const Window here = window;
    if (index + stride < call.windows) {
      window = window_behind(call, window, stride);
      stage_window(window, index + stride, buffer ^ 1);
    }
    if (!active) continue;
    const int query_row = (buffer * block_queries + warp * kBiasWarpQueries) * C::kStride + down;
    const int key_row = buffer * kBiasKeys * C::kStride + across;
    QueryRows<D> rows;
    load_queries<T, D>(q_rows + query_row, grad_rows + query_row,
                       row_rows + buffer * block_queries + warp * kBiasWarpQueries, &rows);
    // Keys beyond the window are zero, and their sums are never read.
    SWIN_UNROLL
    for (int key_tile = 0; key_tile < kKeyTiles; ++key_tile) {
      if (first_key + key_tile * kTile >= call.n) break;
      float s[kTiles][2][4] = {}, dp[kTiles][2][4];
      const int at = key_row + key_tile * kTile * C::kStride;
      score_keys<T, D>(rows, k_rows + at, v_rows + at, bias_tiles + key_tile * 32, tile_row, diagonal, s, dp);
      if (here.seam) mask_keys(here, own, first_key + key_tile * kTile, mask, s);
      add_score_gradients(s, dp, rows.lse, factor, key_tile, total);
    }
  }
  if (!active) return;
  float* const plane = call.planes + (static_cast<int64_t>(head) * stride + begin) * call.padded * call.padded;
  store_sums(call, own, first_key, plane, total);
}

// ---- host -----------------------------------------------------------------------------------------------------------

template <int D>
int64_t qkv_shared_bytes(int warps, int query_block) {
  using C = Cut<D>;
  const int64_t keys = warps * Own<D>::kWarpKeys;
  return 2 * (4 * keys * C::kStride + 4 * query_block * C::kStride + keys * (query_block + 8)) + 2 * query_block * 8;
}

template <int D>
int64_t bias_shared_bytes(int warps) {
  const int64_t queries = warps * kBiasWarpQueries;
  return 2 * 2 * 2 * (queries + kBiasKeys) * Cut<D>::kStride + 2 * queries * 8;
}

// As cut_half below.
template <int D>
const char* cut_head_dim(const DeviceLimits& limits, const SwinBackwardCut& asked, const Windows& call,
                         BackwardPlan* plan) {
  const int64_t key_units = divide_up(call.n, Own<D>::kWarpKeys), query_units = divide_up(call.n, kBiasWarpQueries);
  const int64_t windows = call.windows < 1 ? 1 : call.windows;
  const auto quantities = {
      Asked{"key_warps", asked.key_warps, 1, key_units < Own<D>::kMaxWarps ? key_units : Own<D>::kMaxWarps},
      Asked{"query_block", asked.query_block, kTile, call.padded}, Asked{"qkv_blocks", asked.qkv_blocks, 1, windows},
      Asked{"bias_warps", asked.bias_warps, 1, query_units < kBiasMaxWarps ? query_units : kBiasMaxWarps},
      Asked{"parts", asked.parts, 1, windows < 65535 ? windows : 65535}};
  if (const char* reason = out_of_range(quantities)) return reason;
  if (asked.query_block % kTile != 0) {
    return refusal("query_block is " + std::to_string(asked.query_block) + ", accepted are multiples of 16");
  }

  plan->key_blocks = static_cast<int>(divide_up(key_units, asked.key_warps > 0 ? asked.key_warps : Own<D>::kMaxWarps));
  plan->key_warps = asked.key_warps > 0 ? asked.key_warps : static_cast<int>(divide_up(key_units, plan->key_blocks));
  plan->query_block = call.padded < 128 ? call.padded : 128;
  while (qkv_shared_bytes<D>(plan->key_warps, plan->query_block) > limits.shared_per_block && plan->query_block > 16) {
    plan->query_block /= 2;
  }
  if (asked.query_block > 0) plan->query_block = asked.query_block;
  plan->qkv_shared = qkv_shared_bytes<D>(plan->key_warps, plan->query_block);
  // As many blocks as shared memory, registers and threads allow to be resident at a time, shared among the heads.
  const int threads = plan->key_warps * 32;
  const int64_t by_shared = limits.shared_per_multiprocessor / (plan->qkv_shared + 1024);
  const int64_t by_registers = 65536 / (threads * 255), by_threads = 1536 / threads;
  int64_t resident = by_shared < by_registers ? by_shared : by_registers;
  if (by_threads < resident) resident = by_threads;
  int64_t blocks = (resident < 1 ? 1 : resident) * limits.multiprocessors / call.heads;
  if (blocks > call.windows) blocks = call.windows;
  plan->qkv_blocks = asked.qkv_blocks > 0 ? asked.qkv_blocks : static_cast<int>(blocks < 1 ? 1 : blocks);

  plan->bias_warps = static_cast<int>(divide_up(query_units, divide_up(query_units, kBiasMaxWarps)));
  while (bias_shared_bytes<D>(plan->bias_warps) > limits.shared_per_block && plan->bias_warps > 1) --plan->bias_warps;
  if (asked.bias_warps > 0) plan->bias_warps = asked.bias_warps;
  plan->bias_shared = bias_shared_bytes<D>(plan->bias_warps);
  plan->bias_tiles = divide_up(query_units, plan->bias_warps) * (call.padded / kBiasKeys);
  plan->delta_tiles = divide_up(query_units, plan->bias_warps);
  plan->bias_resident = limits.shared_per_multiprocessor / (plan->bias_shared + 1024);
  if (plan->bias_resident > (D <= 16 ? 2 : 1)) plan->bias_resident = D <= 16 ? 2 : 1;  // by their registers
  const int64_t delta_parts = plan->bias_resident * limits.multiprocessors / (plan->delta_tiles * call.heads);
  plan->delta_parts = delta_parts < 1 ? 1 : delta_parts < windows ? delta_parts : windows;
  plan->pad_rows = call.windows * plan->key_blocks;
  if (plan->qkv_shared <= limits.shared_per_block && plan->bias_shared <= limits.shared_per_block) return nullptr;
  const std::string asked_text = text_of(quantities);
  if (asked_text.empty()) return "the gradient needs more shared memory than a block of this device has";
  return refusal(asked_text + " need " + std::to_string(plan->qkv_shared) + " and " +
                 std::to_string(plan->bias_shared) + " bytes of shared memory, a block has " +
                 std::to_string(limits.shared_per_block));
}

struct CutFor {
  const DeviceLimits& limits;
  const SwinBackwardCut& asked;
  const Windows& call;
  BackwardPlan* plan;
  template <int D>
  const char* operator()() const {
    return cut_head_dim<D>(limits, asked, call, plan);
  }
};

template <class T>
struct Passes {
  const BackwardCall& call;
  const BackwardPlan& plan;
  void* stream;

  template <int D>
  const char* operator()() const {
    const char* error = launch(find_delta<T, D>, blocks_of(plan.delta_tiles, call.heads, plan.delta_parts),
                               plan.bias_warps * 32, plan.bias_shared, stream, call);
    if (error) return error;
    error = launch(differentiate_qkv<T, D>, blocks_of(plan.qkv_blocks, call.heads), plan.key_warps * 32,
                   plan.qkv_shared, stream, call, plan.key_blocks, plan.query_block);
    if (error) return error;
    return launch(differentiate_bias<T, D>, blocks_of(plan.bias_tiles, call.heads, plan.parts), plan.bias_warps * 32,
                  plan.bias_shared, stream, call);
  }
};

template <class T>
const char* differentiate(const BackwardCall& call, const BackwardPlan& plan, void* stream) {
  const int64_t threads = static_cast<int64_t>(call.heads) * call.padded * call.padded / 4;
  if (const char* error = launch(prepare_bias<T>, blocks_of(divide_up(threads, 256)), 256, 0, stream, call)) {
    return error;
  }
  if (const char* error = launch_prepare_rows<T>(call, stream)) return error;
  return with_head_dim(call.head_dim, Passes<T>{call, plan, stream});
}

}  // namespace

const char* cut_half(const DeviceLimits& limits, const SwinBackwardCut& asked, const Windows& call,
                     BackwardPlan* plan) {
  return with_head_dim(call.head_dim, CutFor{limits, asked, call, plan});
}

const char* differentiate_bfloat16(const BackwardCall& call, const BackwardPlan& plan, void* stream) {
  return differentiate<BFloat16>(call, plan, stream);
}

const char* differentiate_float16(const BackwardCall& call, const BackwardPlan& plan, void* stream) {
  return differentiate<Float16>(call, plan, stream);
}

}  // namespace swin
