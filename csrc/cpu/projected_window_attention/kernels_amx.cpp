// The kernels for processors with AMX that are not those of AVX-512: a separate forward where it pays off.
#include "cpu/projected_window_attention/kernels.h"
#include "cpu/window_attention/forward_amx.h"

namespace swin {
namespace amx {

using namespace projected_window_attention;
using namespace window_attention;

namespace {

// Up to here qkv of a group of windows stays in the second-level cache.
constexpr int64_t kMostChannels = AmxProjection::kMostPieces * kTileRows;

bool projects_on_tiles(const AttentionCall& call) {
  return on_tiles(call) && call.heads * call.head_dim <= kMostChannels && call.bias_type == ElementType::kFloat32;
}

}  // namespace

bool projects_forward(const AttentionCall& call) { return projects_on_tiles(call) || avx512::projects_forward(call); }

size_t projected_forward_scratch(const ProjectedForwardCall& call) {
  if (!projects_on_tiles(call)) return avx512::projected_forward_scratch(call);
  Arena arena(nullptr);
  AmxForwardWorker(call, arena);
  return arena.used();
}

void projected_forward(const ProjectedForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  if (!projects_on_tiles(call)) return avx512::projected_forward(call, chunks, count, scratch, next);
  Arena arena(scratch);
  AmxForwardWorker(call, arena).run(chunks, count, next);
}

}  // namespace amx
}  // namespace swin
