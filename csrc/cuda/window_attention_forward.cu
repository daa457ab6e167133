// Shifted-window attention; docs/cuda.md derives the floor and how it is approached.
//
// For every window and head, with s = scale q.k + bias + mask: lse = log(sum over keys of exp(s)) and
// out = sum over keys of exp(s - lse) v.
//
// `find_tokens` writes where the tokens of each window lie, `expand_bias` the bias of every pair of tokens. `attend`
// does the rest for 16-bit tensors: a block owns one head and a tile of queries, keeps their bias in shared memory, and
// walks over windows, whose k and v pass by one step ahead. Exponentials bind it, so everything else is kept off the
// units that issue them: scores come out of the tensor cores with the bias already added, because the bias is one more
// product, with a diagonal matrix. `attend_float` is float32 throughout. Results repeat bit for bit.
#include <optional>
#include <type_traits>

#include "cuda/find_tokens.h"
#include "cuda/windows.h"

namespace swin {
namespace {

constexpr int kStepKeys = 32;                // keys whose scores a warp holds at a time
constexpr int kMaxWarps = 12;                // of a block of `attend`, so that a thread may have 168 registers
constexpr float kMostWeight = 256.0f;        // of a key in units of the running maximum; float16 holds up to 65504
constexpr float kLowest = -3.402823466e38f;  // finite: a maximum of minus infinity would make weights NaN

struct Call : Windows {
  int chunk;      // keys that are staged at a time
  int rows;       // queries of a block of `attend`
  bool resident;  // whether the bias of a block lies in shared memory
  void* out;
  float* lse;
  uint4* tiles;  // workspace (heads, padded / 16, padded / 16, 32): see bias_tile
};

// A warp writes one tile.
template <class T>
__global__ void __launch_bounds__(256) expand_bias(const Call call) {
  const int64_t tile = thread_of_grid() / 32;
  const int side = call.padded / kTile;
  if (tile >= static_cast<int64_t>(call.heads) * side * side) return;
  const int column_tile = static_cast<int>(tile % side), row_tile = static_cast<int>(tile / side % side);
  const int head = static_cast<int>(tile / side / side);
  call.tiles[tile * 32 + lane_index()] = bias_tile<T>(call, head, row_tile, column_tile, false);
}

// ---- 16-bit --------------------------------------------------------------------------------------------------------

// The maximum over the four lanes that share a row of scores.
SWIN_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

// The queries of a warp as left factors; `sign` flips those of a negative scale.
template <class T, int D>
SWIN_DEVICE void load_queries(const T* q_rows, uint32_t sign, uint32_t (&q_tile)[Cut<D>::kSteps][4]) {
  SWIN_UNROLL
  for (int step = 0; step < Cut<D>::kSteps; ++step) {
    ldmatrix_x4(q_tile[step], q_rows + step * kTile);
    SWIN_UNROLL
    for (int i = 0; i < 4; ++i) q_tile[step][i] ^= sign;
  }
}

// Scores (over scale) of a warp's 16 queries for kStepKeys keys, added to s; k at the fragment of the lane. The bias
// lies in shared memory (kResident) or not.
template <class T, int D, bool kResident, bool kExact>
SWIN_DEVICE void score_keys(const uint32_t (&q_tile)[Cut<D>::kSteps][4], const T* k_rows, const uint4* bias_tiles,
                            const Diagonal& diagonal, float (&s)[kStepKeys / kTile][2][4]) {
  using C = Cut<D>;
  SWIN_UNROLL
  for (int tile = 0; tile < kStepKeys / kTile; ++tile) {
    uint4 bias;
    if constexpr (kResident) {
      bias = load_shared(bias_tiles + tile * 32);
    } else {
      bias = bias_tiles[tile * 32];
    }
    add_bias(s[tile], bias, diagonal.most);
    if constexpr (!kExact) add_bias(s[tile], bias, diagonal.rest);
    SWIN_UNROLL
    for (int step = 0; step < C::kSteps; ++step) {
      uint32_t k_tile[4];
      ldmatrix_x4(k_tile, k_rows + tile * kTile * C::kStride + step * kTile);
      mma_m16n8k16<T>(s[tile][0], q_tile[step], k_tile[0], k_tile[1], s[tile][0]);
      mma_m16n8k16<T>(s[tile][1], q_tile[step], k_tile[2], k_tile[3], s[tile][1]);
    }
  }
}

// Lowers the scores of a warp's queries for the keys from `first_key` on where their regions differ.
SWIN_DEVICE void mask_keys(const Window& window, const uint32_t (&region)[2], int first_key, float mask,
                           float (&s)[kStepKeys / kTile][2][4]) {
  SWIN_UNROLL
  for (int two = 0; two < kStepKeys / 8; ++two) {  // keys 2t and 2t + 1 of eight
    const auto entry = *reinterpret_cast<const uint4*>(window.tokens + first_key + two * 8 + 2 * (lane_index() % 4));
    SWIN_UNROLL
    for (int i = 0; i < 4; ++i) {
      if ((i % 2 == 0 ? entry.y : entry.w) != region[i / 2]) s[two / 2][two % 2][i] += mask;
    }
  }
}

// Keys beyond the window's `n`, of those from `first_key` on, get no weight.
SWIN_DEVICE void drop_keys(int n, int first_key, float (&s)[kStepKeys / kTile][2][4]) {
  SWIN_UNROLL
  for (int i = 0; i < kStepKeys / 2; ++i) {
    if (first_key + i / 4 * 8 + 2 * (lane_index() % 4) + i % 2 >= n) s[i / 8][i / 4 % 2][i % 4] = -kInfinity;
  }
}

// sums += p v of kStepKeys keys; v at the fragment of the lane.
template <class T, int D>
SWIN_DEVICE void add_values(const uint32_t (&p_tile)[kStepKeys / kTile][4], const T* v_rows,
                            float (&sums)[Cut<D>::kColumns][4]) {
  using C = Cut<D>;
  SWIN_UNROLL
  for (int tile = 0; tile < kStepKeys / kTile; ++tile) {
    SWIN_UNROLL
    for (int pair = 0; pair < C::kPairs; ++pair) {
      uint32_t v_tile[4];
      ldmatrix_x4_trans(v_tile, v_rows + tile * kTile * C::kStride + pair * kTile);
      SWIN_UNROLL
      for (int column = 2 * pair; column < 2 * pair + 2 && column < C::kColumns; ++column) {
        const int b = column % 2 * 2;
        mma_m16n8k16<T>(sums[column], p_tile[tile], v_tile[b], v_tile[b + 1], sums[column]);
      }
    }
  }
}

// The outputs of a warp's queries and their lse, from what one lane of each four holds.
template <class T, int D>
SWIN_DEVICE void store_outputs(const Call& call, const Window& window, int head, uint32_t channels,
                               const uint32_t (&token)[2], const float (&maximum)[2], const float (&total)[2],
                               const float (&sums)[Cut<D>::kColumns][4]) {
  const int t = lane_index() % 4;
  T* const out = static_cast<T*>(call.out) + window.first * channels + head * D + 2 * t;
  float* const lse = call.lse + window.first * call.heads + head;
  SWIN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(total[half]), part = reciprocal_approx(sum);
    if (token[half] >= kPadding) continue;  // a padding query has no output
    T* const at = out + uint64_t{token[half]} * channels;
    SWIN_UNROLL
    for (int column = 0; column < Cut<D>::kColumns; ++column) {
      *reinterpret_cast<uint32_t*>(at + column * 8) =
          pack<T>(sums[column][2 * half] * part, sums[column][2 * half + 1] * part);
    }
    if (t == 0) {
      lse[uint64_t{token[half]} * static_cast<uint32_t>(call.heads)] = (maximum[half] + log2_approx(sum)) * kLn2;
    }
  }
}

// A block owns the queries [blockIdx.x rows, ...) of head blockIdx.y in every gridDim.z-th window; a warp 16 of them.
// Scores are kept divided by scale: a product with a diagonal matrix adds the bias, and weights are
// 2^(scale log2(e) score - maximum), one fused multiply-add before the exponential. The running maximum only keeps
// weights in range: it moves when those of a row exceed kMostWeight, which their sum, needed anyway, shows and all
// lanes of a warp decide together. Most steps need neither comparison of scores nor shuffle nor rescaling.
template <class T, int D>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) attend(const Call call) {
  using C = Cut<D>;
  constexpr int kTiles = kStepKeys / kTile;
  const int lane = lane_index(), warp = warp_index();
  const int g = lane / 4, head = static_cast<int>(blockIdx.y);
  const int block_row = static_cast<int>(blockIdx.x) * call.rows, own = block_row + warp * kTile;
  const int chunks = (call.padded + call.chunk - 1) / call.chunk, side = call.padded / kTile;
  const int block_rows = call.padded - block_row < call.rows ? call.padded - block_row : call.rows;
  const auto channels = static_cast<uint32_t>(call.heads * D);
  const float magnitude = call.scale < 0 ? -call.scale : call.scale, factor = magnitude * kLog2E;
  const uint32_t sign = call.scale < 0 ? 0x80008000u : 0u;
  const float mask = kMask / magnitude;
  const Diagonal diagonal = diagonal_of(1.0f / magnitude);
  const Share<D> share = own_share<D>();

  T* const q_rows = reinterpret_cast<T*>(shared_memory());                                   // (2, rows, kStride)
  T* const k_rows = q_rows + 2 * call.rows * C::kStride;                                     // (2, chunk, kStride)
  T* const v_rows = k_rows + 2 * call.chunk * C::kStride;                                    // (2, chunk, kStride)
  uint4* const bias_tiles = reinterpret_cast<uint4*>(v_rows + 2 * call.chunk * C::kStride);  // (warps, side, 32)
  const uint4* const own_tiles = call.tiles + ((static_cast<int64_t>(head) * side + own / kTile) * side) * 32 + lane;
  const uint4* const resident_tiles = bias_tiles + warp * side * 32 + lane;
  if (call.resident && own < call.padded) {  // a warp loads its own tiles, and no other warp reads them
    for (int tile = 0; tile < side; ++tile) {
      cp_async_16(bias_tiles + (warp * side + tile) * 32 + lane, own_tiles + tile * 32, true);
    }
  }

  const auto stage_step = [&](const Window& window, int chunk, int buffer) {
    const int first = chunk * call.chunk, end = call.padded - first < call.chunk ? call.padded : first + call.chunk;
    if (chunk == 0) {
      stage_queries<T, D>(share, window, head, block_row, block_row + block_rows, call.qkv, 3 * channels,
                          q_rows + buffer * call.rows * C::kStride);
    }
    const int at = buffer * call.chunk * C::kStride;
    stage_keys<T, D>(call, share, window, head, first, end, k_rows + at, v_rows + at);
  };

  const int across = kept(across_first(lane, C::kStride)), down = kept(down_first(lane, C::kStride));
  const int own_q = kept(warp * kTile * C::kStride + down_first(lane, C::kStride));
  uint32_t q_tile[C::kSteps][4];
  float sums[C::kColumns][4], maximum[2], total[2];  // of rows g and g + 8

  // The keys [first, end) of a window, whose k, v and bias lie at k_at, v_at and tile_at.
  const auto attend_keys = [&](auto resident, auto exact, int first, int end, const Window& window,
                               const uint32_t (&region)[2], const T* k_at, const T* v_at, const uint4* tile_at) {
    // Of the steps that begin after key 0, those from here on need a mask or reach beyond the window.
    const auto plain = static_cast<uint32_t>(window.seam || call.n < kStepKeys ? 0 : call.n - kStepKeys);
    SWIN_NO_UNROLL
    for (int key = first; key < end; key += kStepKeys) {
      float s[kTiles][2][4] = {};
      score_keys<T, D, decltype(resident)::value, decltype(exact)::value>(q_tile, k_at, tile_at, diagonal, s);

      const auto raise_maximum = [&] {
        float most[2] = {kLowest, kLowest};
        SWIN_UNROLL
        for (int i = 0; i < kTiles * 8; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i / 8][i / 4 % 2][i % 4]);
        SWIN_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float moved = fmaxf(maximum[half], quad_max(most[half]) * factor);
          const float shrink = exp2_approx(maximum[half] - moved);
          maximum[half] = moved;
          total[half] *= shrink;
          SWIN_UNROLL
          for (int i = 0; i < 2 * C::kColumns; ++i) sums[i / 2][2 * half + i % 2] *= shrink;
        }
      };
      if (static_cast<uint32_t>(key) - 1 >= plain) {
        if (window.seam) mask_keys(window, region, key, mask, s);
        if (key + kStepKeys > call.n) drop_keys(call.n, key, s);
        if (key == 0) raise_maximum();
      }

      uint32_t p_tile[kTiles][4];  // as fragments of A: rows g and g + 8 of the left half, then of the right one
      float step_total[2];
      const auto weigh = [&] {
        SWIN_UNROLL
        for (int i = 0; i < kTiles * 4; ++i) {
          const float* two = s[i / 4][i % 4 / 2] + i % 2 * 2;
          const float p[2] = {exp2_approx(fmaf(two[0], factor, -maximum[i % 2])),
                              exp2_approx(fmaf(two[1], factor, -maximum[i % 2]))};
          step_total[i % 2] = i < 2 ? p[0] + p[1] : step_total[i % 2] + (p[0] + p[1]);
          p_tile[i / 4][i % 4] = pack<T>(p[0], p[1]);
        }
      };
      weigh();
      if (warp_any(step_total[0] > kMostWeight || step_total[1] > kMostWeight)) {
        raise_maximum();
        weigh();
      }
      total[0] += step_total[0], total[1] += step_total[1];
      add_values<T, D>(p_tile, v_at, sums);
      k_at += kStepKeys * C::kStride, v_at += kStepKeys * C::kStride, tile_at += kTiles * 32;
    }
  };

  bool active = false;
  int index = static_cast<int>(blockIdx.z), chunk = 0;
  const int stride = static_cast<int>(gridDim.z);
  Window window = window_at(call, index);
  stage_step(window, 0, 0);
  cp_async_commit();
  for (int buffer = 0; index < call.windows; buffer ^= 1) {
    cp_async_wait<0>();
    block_barrier();  // this step's rows have arrived, and no thread reads the other buffer any more
    const bool last = chunk + 1 == chunks;
    const int next_chunk = last ? 0 : chunk + 1;
    const bool ends = last && index + stride >= call.windows;
    const Window next = last && !ends ? window_behind(call, window, stride) : window;
    if (!ends) stage_step(next, next_chunk, buffer ^ 1);
    cp_async_commit();

    uint32_t token[2] = {kAbsent, kAbsent}, region[2] = {};
    if (own < call.padded) {
      SWIN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const uint2 entry = window.tokens[own + g + half * 8];
        token[half] = entry.x, region[half] = entry.y;
      }
    }
    if (chunk == 0) {
      active = warp_any(token[0] < kPadding || token[1] < kPadding);
      SWIN_UNROLL
      for (int i = 0; i < 4 * C::kColumns; ++i) sums[i / 4][i % 4] = 0;
      maximum[0] = maximum[1] = kLowest, total[0] = total[1] = 0;
      if (active) load_queries<T, D>(q_rows + buffer * call.rows * C::kStride + own_q, sign, q_tile);
    }
    if (active) {
      const int first = chunk * call.chunk, end = call.n - first < call.chunk ? call.n : first + call.chunk;
      const T* const k_first = k_rows + buffer * call.chunk * C::kStride + across;
      const T* const v_first = v_rows + buffer * call.chunk * C::kStride + down;
      const int tile = first / kTile * 32;
      constexpr std::true_type yes;
      constexpr std::false_type no;
      if (!call.resident) {
        attend_keys(no, no, first, end, window, region, k_first, v_first, own_tiles + tile);
      } else if (!diagonal.exact) {
        attend_keys(yes, no, first, end, window, region, k_first, v_first, resident_tiles + tile);
      } else {
        attend_keys(yes, yes, first, end, window, region, k_first, v_first, resident_tiles + tile);
      }
      if (last) store_outputs<T, D>(call, window, head, channels, token, maximum, total, sums);
    }
    window = next, chunk = next_chunk;
    if (last) index += stride;
  }
}

// ---- float32 -------------------------------------------------------------------------------------------------------

constexpr int kFloatThreads = 128;
constexpr int kFloatKeys = 32;  // staged at a time

// A block owns a window, a head and some queries; a thread owns 8 or 16 channels of one query and walks over the keys.
template <int D>
__global__ void __launch_bounds__(kFloatThreads) attend_float(const Call call) {
  constexpr int kOwn = D < 16 ? D : 16, kLanes = D / kOwn;
  const int head = static_cast<int>(blockIdx.y), channel = static_cast<int>(threadIdx.x) % kLanes * kOwn;
  const int query = (static_cast<int>(blockIdx.z) * kFloatThreads + static_cast<int>(threadIdx.x)) / kLanes;
  const int64_t channels = channels_of(call);
  const Window window = window_at(call, static_cast<int>(blockIdx.x));
  float* const k_rows = reinterpret_cast<float*>(shared_memory());  // (kFloatKeys, D)
  float* const v_rows = k_rows + kFloatKeys * D;                    // (kFloatKeys, D)

  const uint2 token = query < call.n ? window.tokens[query] : make_uint2(kAbsent, 0);
  const bool works = token.x < kPadding;
  const int64_t position = window.first + (works ? token.x : 0);
  const int raster = works ? call.rasters[query] : 0;
  float q[kOwn] = {}, sums[kOwn] = {}, maximum = kLowest, total = 0;
  if (works) {
    const float* const from = static_cast<const float*>(call.qkv) + position * 3 * channels + head * D + channel;
    SWIN_UNROLL
    for (int i = 0; i < kOwn; ++i) q[i] = from[i];
  }
  const auto* const qkv = static_cast<const float*>(call.qkv) + window.first * 3 * channels + head * D;
  const auto* const pad = static_cast<const float*>(call.pad_qkv) + (call.pad_qkv ? head * D : 0);
  for (int first = 0; first < call.n; first += kFloatKeys) {
    const int count = call.n - first < kFloatKeys ? call.n - first : kFloatKeys;
    block_barrier();  // no thread reads the last keys any more
    for (int i = static_cast<int>(threadIdx.x); i < count * (D / 4); i += kFloatThreads) {
      const uint32_t other = window.tokens[first + i / (D / 4)].x;
      const bool valid = other < kPadding || call.pad_qkv != nullptr;
      const float* const from = (other < kPadding ? qkv + other * 3 * channels : valid ? pad : qkv) + i % (D / 4) * 4;
      cp_async_16(k_rows + i * 4, from + channels, valid);
      cp_async_16(v_rows + i * 4, from + 2 * channels, valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    block_barrier();
    SWIN_NO_UNROLL
    for (int key = 0; key < count; ++key) {
      float score = 0;
      SWIN_UNROLL
      for (int i = 0; i < kOwn; i += 4) {
        const float4 k = load_shared(reinterpret_cast<const float4*>(k_rows + key * D + channel + i));
        score = fmaf(q[i], k.x, fmaf(q[i + 1], k.y, fmaf(q[i + 2], k.z, fmaf(q[i + 3], k.w, score))));
      }
      SWIN_UNROLL
      for (int lanes = 1; lanes < kLanes; lanes *= 2) score += shuffle_xor(score, lanes);
      if (!works) continue;
      score = fmaf(score, call.scale, bias_of<float>(call, head, raster, call.rasters[first + key]));
      if (window.seam && window.tokens[first + key].y != token.y) score += kMask;
      if (score > maximum) {
        const float shrink = exp2_approx((maximum - score) * kLog2E);
        maximum = score;
        total *= shrink;
        SWIN_UNROLL
        for (int i = 0; i < kOwn; ++i) sums[i] *= shrink;
      }
      const float p = exp2_approx((score - maximum) * kLog2E);  // of large scores only the difference is exact
      total += p;
      SWIN_UNROLL
      for (int i = 0; i < kOwn; i += 4) {
        const float4 v = load_shared(reinterpret_cast<const float4*>(v_rows + key * D + channel + i));
        sums[i] = fmaf(p, v.x, sums[i]), sums[i + 1] = fmaf(p, v.y, sums[i + 1]);
        sums[i + 2] = fmaf(p, v.z, sums[i + 2]), sums[i + 3] = fmaf(p, v.w, sums[i + 3]);
      }
    }
  }
  if (!works) return;
  float* const out = static_cast<float*>(call.out) + position * channels + head * D + channel;
  SWIN_UNROLL
  for (int i = 0; i < kOwn; ++i) out[i] = sums[i] / total;
  if (channel == 0) call.lse[position * call.heads + head] = maximum + logf(total);
}

// ---- launch --------------------------------------------------------------------------------------------------------

constexpr int kMostWarps = 16;  // of a multiprocessor in an override: four per scheduler, of 128 registers per thread

std::optional<SwinForwardCut> overriding;

struct Plan : SwinForwardCut {
  int blocks;  // of a head's queries
  int64_t shared_bytes;
};

// Cuts the queries of a head into blocks, and the windows into parts, so that the busiest scheduler finishes as early
// as possible. A multiprocessor has four schedulers; one with a single warp waits about half of the time
// (docs/cuda.md). The bias of a block lies in shared memory beside two chunks of k and v, or is read from memory in
// every window. What `asked` sets is taken as it is.
template <int D>
const char* cut(const DeviceLimits& limits, const SwinForwardCut& asked, Call* call, Plan* plan) {
  constexpr int kRow = Cut<D>::kStride * 2;  // bytes
  const int64_t tiles = call->padded / kTile, steps = call->padded / kStepKeys;
  const int64_t most_parts = call->windows < 1 ? 1 : call->windows < 65535 ? call->windows : 65535;
  const auto quantities = {Asked{"warps", asked.warps, 1, tiles < kMaxWarps ? tiles : kMaxWarps},
                           Asked{"together", asked.together, 1, asked.warps > 0 ? kMostWarps / asked.warps : kMaxWarps},
                           Asked{"resident", asked.resident, -1, 1}, Asked{"chunks", asked.chunks, 1, steps},
                           Asked{"parts", asked.parts, 1, most_parts}};
  if (const char* reason = out_of_range(quantities)) return reason;
  if (asked.chunks > 0 && divide_up(steps, divide_up(steps, asked.chunks)) != asked.chunks) {
    return refusal("chunks is " + std::to_string(asked.chunks) + ", in which " + std::to_string(steps) +
                   " steps of 32 keys cannot be cut evenly; accepted is for instance " +
                   std::to_string(divide_up(steps, divide_up(steps, asked.chunks))));
  }
  const int most_warps = asked.warps > 0 && asked.together > 0 ? kMostWarps : kMaxWarps;
  const int last_together = asked.together > 0 ? asked.together : 2;  // blocks that a multiprocessor holds
  double least = kInfinity;
  for (const bool resident : {true, false}) {
    if (asked.resident != 0 && resident != (asked.resident > 0)) continue;
    const int64_t warp_bytes = 2 * kTile * kRow + (resident ? tiles * 512 : 0);
    for (int together = asked.together > 0 ? asked.together : 1; together <= last_together; ++together) {
      const int64_t half = limits.shared_per_multiprocessor / together - 1024;
      const int64_t shared = half < limits.shared_per_block ? half : limits.shared_per_block;
      for (int64_t warps = 1; warps * together <= most_warps && warps <= tiles; ++warps) {
        if (asked.warps > 0 && warps != asked.warps) continue;
        const int64_t fitting = (shared - warps * warp_bytes) / (4 * kStepKeys * kRow);  // steps of k and v
        if (fitting < 1) break;
        const int64_t chunks = asked.chunks > 0 ? asked.chunks : divide_up(steps, fitting);
        if (divide_up(steps, chunks) > fitting) break;
        const int64_t chunk = divide_up(steps, chunks) * kStepKeys;
        const int64_t blocks = divide_up(tiles, warps), slots = int64_t{limits.multiprocessors} * together;
        int64_t parts = asked.parts > 0 ? asked.parts : slots / (blocks * call->heads);
        if (parts > call->windows) parts = call->windows;
        if (parts < 1) parts = 1;
        const int64_t turns = divide_up(blocks * call->heads * parts, slots) * divide_up(call->windows, parts);
        const int64_t warps_of_scheduler = divide_up(warps * together, 4);
        const double cost = static_cast<double>(turns * (warps_of_scheduler < 2 ? 2 : warps_of_scheduler)) *
                            (1 + 0.02 * static_cast<double>(chunks)) * (resident ? 1 : 1.5);
        if (cost >= least) continue;
        least = cost;
        plan->warps = static_cast<int>(warps), plan->together = together, plan->resident = resident ? 1 : -1;
        plan->chunks = static_cast<int>(chunks), plan->parts = static_cast<int>(parts);
        plan->blocks = static_cast<int>(blocks);
        plan->shared_bytes = 4 * chunk * kRow + warps * warp_bytes;
        call->chunk = static_cast<int>(chunk), call->rows = static_cast<int>(warps) * kTile;
        call->resident = resident;
      }
    }
  }
  if (least < kInfinity) return nullptr;
  const std::string asked_text = text_of(quantities);
  if (asked_text.empty()) return "window_attention: a block of this GPU has too little shared memory";
  return refusal(asked_text + " need more than the " + std::to_string(limits.shared_per_block) +
                 " bytes of shared memory of a block, or " + std::to_string(limits.shared_per_multiprocessor) +
                 " of a multiprocessor");
}

struct CutFor {
  SwinElement element;
  const DeviceLimits& limits;
  Call* call;
  Plan* plan;
  template <int D>
  const char* operator()() const {
    if (overriding && element == kSwinFloat32) return kFloatHasNoCut;
    return cut<D>(limits, overriding.value_or(SwinForwardCut{}), call, plan);
  }
};

const char* make_plan(const SwinAttention& attention, Call* call, Plan* plan) {
  DeviceLimits limits;
  if (const char* reason = read_call(attention, kStepKeys, &limits, call)) return reason;
  return with_head_dim(attention.head_dim, CutFor{attention.element, limits, call, plan});
}

// Hands out the workspace; returns its bytes.
int64_t carve(const SwinAttention& attention, void* workspace, Call* call) {
  Carver carver{static_cast<unsigned char*>(workspace)};
  carver.take_tokens(call);
  const int64_t side = call->padded / kTile;
  carver.take(&call->tiles, attention.element == kSwinFloat32 ? 0 : attention.heads * side * side * 32);
  return carver.used;
}

template <class T>
struct Attend {
  const Call& call;
  const Plan& plan;
  void* stream;
  template <int D>
  const char* operator()() const {
    if constexpr (sizeof(T) == 4) {
      const int64_t lanes = D < 16 ? 1 : D / 16;
      const LaunchGrid blocks = blocks_of(call.windows, call.heads, divide_up(call.n * lanes, kFloatThreads));
      return launch(attend_float<D>, blocks, kFloatThreads, 2 * kFloatKeys * D * 4, stream, call);
    } else {
      const LaunchGrid blocks = blocks_of(plan.blocks, call.heads, plan.parts);
      return launch(attend<T, D>, blocks, plan.warps * 32, plan.shared_bytes, stream, call);
    }
  }
};

template <class T>
const char* run(const Call& call, const Plan& plan, void* stream) {
  if (call.windows == 0) return nullptr;
  const auto threads = [](int64_t count) { return blocks_of(divide_up(count, 256)); };
  const int64_t padded = call.padded;
  const char* error = launch(find_tokens, threads(call.windows_a_volume * padded), 256, 0, stream, call);
  if (error) return error;
  if constexpr (sizeof(T) == 2) {
    error = launch(expand_bias<T>, threads(call.heads * padded * padded / 8), 256, 0, stream, call);
    if (error) return error;
  }
  return with_head_dim(call.head_dim, Attend<T>{call, plan, stream});
}

}  // namespace
}  // namespace swin

const char* swin_cuda_attention_forward_declines(const SwinAttention* attention) {
  swin::Call call{};
  swin::Plan plan{};
  return swin::make_plan(*attention, &call, &plan);
}

int64_t swin_cuda_attention_forward_workspace_bytes(const SwinAttention* attention) {
  swin::Call call{};
  swin::Plan plan{};
  return swin::make_plan(*attention, &call, &plan) ? 0 : swin::carve(*attention, nullptr, &call);
}

const char* swin_cuda_attention_forward(const SwinAttention* attention, const SwinAttentionForward* tensors,
                                        void* workspace, void* stream) {
  swin::Call call{};
  swin::Plan plan{};
  if (const char* reason = swin::make_plan(*attention, &call, &plan)) return reason;
  swin::carve(*attention, workspace, &call);
  call.qkv = tensors->qkv, call.bias_table = tensors->bias_table, call.pad_qkv = tensors->pad_qkv;
  call.out = tensors->out, call.lse = tensors->lse;
  switch (attention->element) {
    case kSwinFloat32: return swin::run<float>(call, plan, stream);
    case kSwinBFloat16: return swin::run<swin::BFloat16>(call, plan, stream);
    case kSwinFloat16: return swin::run<swin::Float16>(call, plan, stream);
  }
  return "window_attention_forward: unknown element type";
}

void swin_cuda_override_forward_cut(const SwinForwardCut* cut) {
  swin::overriding = cut ? std::optional(*cut) : std::nullopt;
}

const char* swin_cuda_attention_forward_cut(const SwinAttention* attention, SwinForwardCut* cut) {
  if (attention->element == kSwinFloat32) return swin::kFloatHasNoCut;
  swin::Call call{};
  swin::Plan plan{};
  const char* const reason = swin::make_plan(*attention, &call, &plan);
  *cut = plan;
  return reason;
}
