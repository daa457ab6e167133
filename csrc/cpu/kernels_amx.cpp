// The kernels of processors with AMX: those of AVX-512, and a forward of their own where it pays.
#include "kernels.h"
#include "window_attention_amx.h"

namespace swin {
namespace avx512 {
extern const KernelTable kernels;
}

namespace amx {
namespace {

bool on_tiles(const AttentionCall& call) {
  return call.type == ElementType::kFloat32 && call.head_dim == AmxForwardWorker::kHeadDim && call.dropout_p == 0;
}

size_t attention_scratch(const AttentionCall& call, bool backward) {
  if (backward || !on_tiles(call)) return avx512::kernels.attention_scratch(call, backward);
  Arena arena(nullptr);
  AmxForwardWorker(static_cast<const ForwardCall&>(call), arena);
  return arena.used();
}

void prepare_bias(const AttentionCall& call, WorkCounter& next) { avx512::kernels.prepare_bias(call, next); }

void attention_forward(const ForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  if (!on_tiles(call)) return avx512::kernels.attention_forward(call, chunks, count, scratch, next);
  Arena arena(scratch);
  AmxForwardWorker(call, arena).run(chunks, count, next);
}

void attention_backward(const BackwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                        WorkCounter& next) {
  avx512::kernels.attention_backward(call, chunks, count, scratch, next);
}

void reduce_gradients(const BackwardCall& call, const WindowChunk* chunks, int64_t count, WorkCounter& next) {
  avx512::kernels.reduce_gradients(call, chunks, count, next);
}

// Where qkv of a group of windows stays in the second-level cache.
constexpr int64_t kMostChannels = AmxProjection::kMostPieces * kTileRows;

bool projects_on_tiles(const AttentionCall& call) {
  return on_tiles(call) && call.heads * call.head_dim <= kMostChannels && call.bias_type == ElementType::kFloat32;
}

bool projects(const AttentionCall& call, bool backward) {
  return (!backward && projects_on_tiles(call)) || avx512::kernels.projects(call, backward);
}

size_t projected_forward_scratch(const ProjectedForwardCall& call) {
  if (!projects_on_tiles(call)) return avx512::kernels.projected_forward_scratch(call);
  Arena arena(nullptr);
  AmxForwardWorker(call, arena);
  return arena.used();
}

void projected_forward(const ProjectedForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  if (!projects_on_tiles(call)) return avx512::kernels.projected_forward(call, chunks, count, scratch, next);
  Arena arena(scratch);
  AmxForwardWorker(call, arena).run(chunks, count, next);
}

size_t projected_backward_scratch(const ProjectedBackwardCall& call) {
  return avx512::kernels.projected_backward_scratch(call);
}

void projected_backward(const ProjectedBackwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                        WorkCounter& next) {
  avx512::kernels.projected_backward(call, chunks, count, scratch, next);
}

void reduce_projected_gradients(const ProjectedBackwardCall& call, const WindowChunk* chunks, int64_t count,
                                WorkCounter& next) {
  avx512::kernels.reduce_projected_gradients(call, chunks, count, next);
}

}  // namespace

extern const KernelTable kernels;
const KernelTable kernels = {"amx",
                             attention_scratch,
                             prepare_bias,
                             attention_forward,
                             attention_backward,
                             reduce_gradients,
                             projects,
                             projected_forward_scratch,
                             projected_forward,
                             projected_backward_scratch,
                             projected_backward,
                             reduce_projected_gradients};

}  // namespace amx
}  // namespace swin
