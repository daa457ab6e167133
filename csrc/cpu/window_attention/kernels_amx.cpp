// The kernels for processors with AMX that are not those of AVX-512: a separate forward where it pays off.
#include "cpu/window_attention/forward_amx.h"
#include "cpu/window_attention/kernels.h"

namespace swin {
namespace amx {

using namespace window_attention;

size_t attention_forward_scratch(const ForwardCall& call) {
  if (!on_tiles(call)) return avx512::attention_forward_scratch(call);
  Arena arena(nullptr);
  AmxForwardWorker(call, arena);
  return arena.used();
}

void attention_forward(const ForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  if (!on_tiles(call)) return avx512::attention_forward(call, chunks, count, scratch, next);
  Arena arena(scratch);
  AmxForwardWorker(call, arena).run(chunks, count, next);
}

}  // namespace amx
}  // namespace swin
