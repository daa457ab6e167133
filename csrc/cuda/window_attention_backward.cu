// The launchers of the gradient of window attention, and its sums in a fixed order: pass 4 of
// window_attention_backward.h.
#include <optional>

#include "cuda/find_tokens.h"
#include "cuda/window_attention_backward.h"

namespace swin {
namespace {

constexpr int kLargestWindow = 1024;  // tokens: bias tiles and bias gradient are n x n
constexpr int kRounding = 64;         // n is rounded up to a multiple of it: the widest tile of keys

// The first plane of each head becomes the sum of its parts.
__global__ void __launch_bounds__(256) sum_planes(const BackwardCall call) {
  const int64_t plane = static_cast<int64_t>(call.padded) * call.padded, element = thread_of_grid();
  if (element >= static_cast<int64_t>(call.n) * call.padded) return;  // further rows were not written
  float* at = call.planes + blockIdx.y * call.parts * plane + element;
  float sum = 0;
  for (int part = 0; part < call.parts; ++part) sum += at[part * plane];
  *at = sum;
}

// A warp sums the pairs of tokens that share one entry of the table: the key of each query follows from the entry.
template <class T>
__global__ void __launch_bounds__(256) reduce_to_table(const BackwardCall call) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp_index();
  if (entry >= bias_table_length(call.grid)) return;
  const int head = static_cast<int>(blockIdx.y);
  const float* plane = call.planes + static_cast<int64_t>(head) * call.parts * call.padded * call.padded;
  const int offset = static_cast<int>(bias_origin(call.grid) - entry);
  const int extent[kAxes] = {static_cast<int>(call.grid.nominal[0]), static_cast<int>(call.grid.nominal[1]),
                             static_cast<int>(call.grid.nominal[2])};
  float sum = 0;
  const int queries = call.windows > 0 ? call.n : 0;  // for an empty batch no plane was written
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
__global__ void __launch_bounds__(kPadColumns* kPadGroups) reduce_padding(const BackwardCall call) {
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

// ---- host -----------------------------------------------------------------------------------------------------------

std::optional<SwinBackwardCut> overriding;

const char* make_plan(const SwinAttention& attention, BackwardCall* call, BackwardPlan* plan) {
  DeviceLimits limits;
  if (product(attention.grid.window) > kLargestWindow) return "the gradient is for windows of at most 1024 tokens";
  if (const char* reason = read_call(attention, kRounding, &limits, call)) return reason;
  const bool half = attention.element != kSwinFloat32;
  if (!half && overriding) return kFloatHasNoCut;
  const char* reason =
      half ? cut_half(limits, overriding.value_or(SwinBackwardCut{}), *call, plan) : cut_float(*call, plan);
  if (reason) return reason;
  // As many parts as are resident at a time, since one more would wait for all of them; of at most 128 MiB.
  const int64_t tiles = plan->bias_tiles * attention.heads, plane = attention.heads * call->padded * call->padded * 4;
  int64_t parts = plan->bias_resident * limits.multiprocessors / tiles;
  if (parts > (int64_t{128} << 20) / plane) parts = (int64_t{128} << 20) / plane;
  if (parts > call->windows) parts = call->windows;
  plan->parts = overriding && overriding->parts > 0 ? overriding->parts : static_cast<int>(parts < 1 ? 1 : parts);
  return nullptr;
}

// Hands out the workspace; returns its bytes.
int64_t carve(const SwinAttention& attention, const BackwardPlan& plan, void* workspace, BackwardCall* call) {
  const int64_t heads = attention.heads, windows = call->windows, padded = call->padded;
  const bool half = attention.element != kSwinFloat32;
  Carver carver{static_cast<unsigned char*>(workspace)};
  carver.take_tokens(call);
  carver.take(&call->tiles, half ? 2 * heads * padded * padded / 8 : 0);
  carver.take(&call->rows, windows * heads * padded);
  carver.take(&call->planes, heads * plan.parts * padded * padded);
  carver.take(&call->pad_parts, int64_t{plan.pad_rows} * 2 * heads * attention.head_dim);
  carver.take(&call->grad_q_part, half && plan.key_blocks > 1 ? windows * heads * padded * attention.head_dim : 0);
  return carver.used;
}

using Passes = const char*(const BackwardCall&, const BackwardPlan&, void*);

// The gradient of qkv, and the planes whose sums are the gradient of the table.
const char* differentiate_windows(const BackwardCall& call, const BackwardPlan& plan, void* stream, Passes* passes) {
  const int64_t padded = call.padded;
  const LaunchGrid tokens = blocks_of(divide_up(call.windows_a_volume * padded, 256));
  if (const char* error = launch(find_tokens, tokens, 256, 0, stream, call)) return error;
  const char* error = passes(call, plan, stream);
  if (error || plan.parts == 1) return error;
  return launch(sum_planes, blocks_of(divide_up(padded * padded, 256), call.heads), 256, 0, stream, call);
}

template <class T>
const char* differentiate(const BackwardCall& call, const BackwardPlan& plan, void* stream, Passes* passes) {
  const char* error = call.windows > 0 ? differentiate_windows(call, plan, stream, passes) : nullptr;
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

const char* swin_cuda_attention_backward_declines(const SwinAttention* attention) {
  swin::BackwardCall call{};
  swin::BackwardPlan plan{};
  return swin::make_plan(*attention, &call, &plan);
}

int64_t swin_cuda_attention_backward_workspace_bytes(const SwinAttention* attention) {
  swin::BackwardCall call{};
  swin::BackwardPlan plan{};
  return swin::make_plan(*attention, &call, &plan) ? 0 : swin::carve(*attention, plan, nullptr, &call);
}

const char* swin_cuda_attention_backward(const SwinAttention* attention, const SwinAttentionBackward* tensors,
                                         void* workspace, void* stream) {
  swin::BackwardCall call{};
  swin::BackwardPlan plan{};
  if (const char* reason = swin::make_plan(*attention, &call, &plan)) return reason;
  swin::carve(*attention, plan, workspace, &call);
  for (int axis = 0; axis < swin::kAxes; ++axis) {
    call.has_padding |= call.grid.counts[axis] * call.grid.window[axis] != call.grid.spatial[axis];
  }
  call.grad_out = tensors->grad_out, call.qkv = tensors->qkv, call.bias_table = tensors->bias_table;
  call.pad_qkv = tensors->pad_qkv, call.out = tensors->out, call.lse = tensors->lse;
  call.grad_qkv = tensors->grad_qkv, call.grad_bias_table = tensors->grad_bias_table;
  call.grad_pad_qkv = tensors->grad_pad_qkv;
  call.parts = plan.parts, call.pad_rows = call.has_padding ? plan.pad_rows : 0;
  switch (attention->element) {
    case kSwinFloat32: return swin::differentiate<float>(call, plan, stream, swin::differentiate_float);
    case kSwinBFloat16: return swin::differentiate<swin::BFloat16>(call, plan, stream, swin::differentiate_bfloat16);
    case kSwinFloat16: return swin::differentiate<swin::Float16>(call, plan, stream, swin::differentiate_float16);
  }
  return "window_attention_backward: unknown element type";
}

void swin_cuda_override_backward_cut(const SwinBackwardCut* cut) {
  swin::overriding = cut ? std::optional(*cut) : std::nullopt;
}

const char* swin_cuda_attention_backward_cut(const SwinAttention* attention, SwinBackwardCut* cut) {
  if (attention->element == kSwinFloat32) return swin::kFloatHasNoCut;
  swin::BackwardCall call{};
  swin::BackwardPlan plan{};
  const char* const reason = swin::make_plan(*attention, &call, &plan);
  *cut = plan;
  return reason;
}
