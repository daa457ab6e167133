// Picks the build of the kernels that this processor runs.
#include <cstdlib>
#include <cstring>

#ifdef SWIN_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#ifdef SWIN_HAVE_AMX
namespace amx {
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

#ifdef SWIN_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef SWIN_HAVE_AMX
// Tiles are large state, which Linux hands to a process that asks for it.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBFloat16) == 0)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// Widest first.
const Build* builds(int* count) {
#if defined(SWIN_HAVE_AVX2) || defined(SWIN_HAVE_AVX512)
  __builtin_cpu_init();
#endif
  static const Build all[] = {
#ifdef SWIN_HAVE_AMX
      {&amx::kernels, has_amx()},
#endif
#ifdef SWIN_HAVE_AVX512
      {&avx512::kernels, has_avx512()},
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
  *error = "names no build of this library; accepted are amx, avx512, avx2 and baseline, as far as they were built";
  return nullptr;
}

}  // namespace swin
