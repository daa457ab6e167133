// Picks the build of the kernels that this processor runs.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace swin {

namespace baseline {
extern const KernelTable kernels;
}
#ifdef SWIN_HAVE_AVX2
namespace avx2 {
extern const KernelTable kernels;
}
#endif
#ifdef SWIN_HAVE_AVX512
namespace avx512 {
extern const KernelTable kernels;
}
#endif

namespace {

struct Build {
  const KernelTable* kernels;
  bool runs_here;
};

// Widest first.
const Build* builds(int* count) {
#if defined(SWIN_HAVE_AVX2) || defined(SWIN_HAVE_AVX512)
  __builtin_cpu_init();
#endif
  static const Build all[] = {
#ifdef SWIN_HAVE_AVX512
      {&avx512::kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c")},
#endif
#ifdef SWIN_HAVE_AVX2
      {&avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {&baseline::kernels, true},
  };
  *count = sizeof all / sizeof *all;
  return all;
}

}  // namespace

const KernelTable* select_kernels(const char** error) {
  int count;
  const Build* all = builds(&count);
  const char* wanted = std::getenv("SWIN_KERNELS_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (int i = 0; i < count; ++i) {
    if (!any && std::strcmp(wanted, all[i].kernels->isa) != 0) continue;
    if (all[i].runs_here) return all[i].kernels;
    if (any) continue;
    *error = "names a build that this processor does not run";
    return nullptr;
  }
  *error = "names no build of this library; accepted are avx512, avx2 and baseline, as far as they were built";
  return nullptr;
}

}  // namespace swin
