// Picks the build of the decoder's kernels that goes with the one dispatch.cpp picks.
#include <cstring>

#include "decoder.h"

namespace swin {

namespace baseline {
extern const DecoderKernels decoder_kernels;
}
#ifdef SWIN_HAVE_AVX2
namespace avx2 {
extern const DecoderKernels decoder_kernels;
}
#endif
#ifdef SWIN_HAVE_AVX512
namespace avx512 {
extern const DecoderKernels decoder_kernels;
}
#endif

const DecoderKernels* select_decoder_kernels(const char** error) {
  const KernelTable* table = select_kernels(error);
  if (table == nullptr) return nullptr;
#ifdef SWIN_HAVE_AVX512
  // The matrix unit has no kernels of its own here.
  if (std::strcmp(table->isa, "avx512") == 0 || std::strcmp(table->isa, "amx") == 0) return &avx512::decoder_kernels;
#endif
#ifdef SWIN_HAVE_AVX2
  if (std::strcmp(table->isa, "avx2") == 0) return &avx2::decoder_kernels;
#endif
  return &baseline::decoder_kernels;
}

}  // namespace swin
