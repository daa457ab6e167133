// The gradient of window attention in float32, passes 2 and 3 of window_attention_backward.h.
#include "cuda/window_attention_backward.h"

namespace swin {
namespace {

constexpr int kFloatThreads = 128;
constexpr int kFloatChunk = 32;  // rows of the other side that are staged at a time
constexpr int kFloatTile = 32;   // queries and keys of a block of differentiate_bias_float

// Starts to copy kFloatChunk or kFloatTile tokens to rows of `row_stride` elements in shared memory. The source has
// `stride` channels per token; a padding token is read from `pad`, or is zero where that is null.
template <int D>
SWIN_DEVICE void stage(float* shared, int row_stride, const uint2* tokens, int count, const float* source,
                       int64_t stride, const float* pad) {
  for (int i = static_cast<int>(threadIdx.x); i < count * (D / 4); i += static_cast<int>(blockDim.x)) {
    const int row = i / (D / 4), column = i % (D / 4) * 4;
    const uint32_t token = tokens[row].x;
    const bool valid = token < kPadding || (token == kPadding && pad != nullptr);
    const float* const from = token < kPadding ? source + token * stride : valid ? pad : source;
    cp_async_16(shared + row * row_stride + column, from + column, valid);
  }
}

// The q, k, v (part 0, 1, 2) of a head, at the first token of a volume; and those of a padding token.
SWIN_DEVICE const float* part_of(const BackwardCall& call, const Window& window, int head, int part) {
  return static_cast<const float*>(call.qkv) + window.first * 3 * channels_of(call) + part * channels_of(call) +
         head * call.head_dim;
}

SWIN_DEVICE const float* pad_of(const BackwardCall& call, int head, int part) {
  if (call.pad_qkv == nullptr) return nullptr;
  return static_cast<const float*>(call.pad_qkv) + part * channels_of(call) + head * call.head_dim;
}

SWIN_DEVICE const float* grad_of(const BackwardCall& call, const Window& window, int head) {
  return static_cast<const float*>(call.grad_out) + window.first * channels_of(call) + head * call.head_dim;
}

// exp(score - lse); of large scores only the difference is exact.
SWIN_DEVICE float weight_of(float score, float lse) { return exp2_approx((score - lse) * kLog2E); }

// The gradient of q, or those of k and v: a thread owns 8 or 16 channels of one query, or of one key, and walks over
// the tokens on the other side. One block per multiprocessor is asked for: with more, ptxas would spill.
template <int D, bool kKeys>
__global__ void __launch_bounds__(kFloatThreads, 1) differentiate_rows_float(const BackwardCall call) {
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
    from_a = part_of(call, window, head, kKeys ? 1 : 0) + token.x * 3 * channels;
    from_b = kKeys ? from_a + channels : grad_of(call, window, head) + token.x * channels;
  } else if (works) {
    from_a = pad_of(call, head, 1), from_b = pad_of(call, head, 2);
  }
  SWIN_UNROLL
  for (int i = 0; i < kOwn; ++i) {
    if (from_a != nullptr) a[i] = from_a[channel + i], b[i] = from_b[channel + i];
  }

  for (int first = 0; first < call.n; first += kFloatChunk) {
    const uint2* tokens = window.tokens + first;
    if (kKeys) {
      stage<D>(other_a, D, tokens, kFloatChunk, part_of(call, window, head, 0), 3 * channels, nullptr);
      stage<D>(other_b, D, tokens, kFloatChunk, grad_of(call, window, head), channels, nullptr);
      stage_rows(other_rows, rows + first, kFloatChunk);
    } else {
      stage<D>(other_a, D, tokens, kFloatChunk, part_of(call, window, head, 1), 3 * channels, pad_of(call, head, 1));
      stage<D>(other_b, D, tokens, kFloatChunk, part_of(call, window, head, 2), 3 * channels, pad_of(call, head, 2));
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
      // In the forward's order: the rounding of large scores then cancels that of lse.
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
      score = fmaf(
          score, call.scale,
          kKeys ? bias_of<float>(call, head, other_raster, raster) : bias_of<float>(call, head, raster, other_raster));
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
__global__ void __launch_bounds__(256) differentiate_bias_float(const BackwardCall call) {
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
    bias[i] = exists ? bias_of<float>(call, head, call.rasters[at_query], call.rasters[at_key]) : -kInfinity;
  }
  for (int index = static_cast<int>(blockIdx.z); index < call.windows; index += static_cast<int>(gridDim.z)) {
    const Window window = window_at(call, index);
    const uint2 *queries = window.tokens + first_query, *keys = window.tokens + first_key;
    const float2* rows = rows_of(call, index, head) + first_query;
    stage<D>(q_rows, kStride, queries, kFloatTile, part_of(call, window, head, 0), 3 * channels, nullptr);
    stage<D>(grad_rows, kStride, queries, kFloatTile, grad_of(call, window, head), channels, nullptr);
    stage<D>(k_rows, kStride, keys, kFloatTile, part_of(call, window, head, 1), 3 * channels, pad_of(call, head, 1));
    stage<D>(v_rows, kStride, keys, kFloatTile, part_of(call, window, head, 2), 3 * channels, pad_of(call, head, 2));
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

// ---- host -----------------------------------------------------------------------------------------------------------

template <int D>
const char* cut_head_dim(const Windows& call, BackwardPlan* plan) {
  constexpr int kLanes = D < 16 ? 1 : D / 16;
  plan->row_blocks = static_cast<int>(divide_up(call.n, kFloatThreads / kLanes));
  plan->bias_tiles = static_cast<int64_t>(call.padded / kFloatTile) * (call.padded / kFloatTile);
  plan->bias_resident = 4;
  plan->pad_rows = call.windows * plan->row_blocks;
  return nullptr;
}

struct CutFor {
  const Windows& call;
  BackwardPlan* plan;
  template <int D>
  const char* operator()() const {
    return cut_head_dim<D>(call, plan);
  }
};

struct Passes {
  const BackwardCall& call;
  const BackwardPlan& plan;
  void* stream;

  template <int D>
  const char* operator()() const {
    const LaunchGrid rows = blocks_of(call.windows, call.heads, plan.row_blocks);
    // Staged rows; then, for keys, the sums of padding tokens.
    const int64_t staged = kFloatChunk * (2 * D * 4 + 8), sums = kFloatThreads * 2 * 4 * (D < 16 ? D : 16);
    const char* error = launch(differentiate_rows_float<D, false>, rows, kFloatThreads, staged, stream, call);
    if (error) return error;
    error = launch(differentiate_rows_float<D, true>, rows, kFloatThreads, staged > sums ? staged : sums, stream, call);
    if (error) return error;
    return launch(differentiate_bias_float<D>, blocks_of(plan.bias_tiles, call.heads, plan.parts), 256,
                  4 * kFloatTile * (D + 4) * 4, stream, call);
  }
};

}  // namespace

const char* cut_float(const Windows& call, BackwardPlan* plan) {
  return with_head_dim(call.head_dim, CutFor{call, plan});
}

const char* differentiate_float(const BackwardCall& call, const BackwardPlan& plan, void* stream) {
  if (const char* error = launch_prepare_rows<float>(call, stream)) return error;
  return with_head_dim(call.head_dim, Passes{call, plan, stream});
}

}  // namespace swin
