// Picks the build of the kernels to run on this processor.
#include "cpu/builds.h"

#include <cstdlib>
#include <cstring>

#ifdef SWIN_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace swin {
namespace {

constexpr const char* kNames[kBuilds] = {"baseline", "avx2", "avx512", "amx"};

#ifdef SWIN_HAVE_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
#endif

#ifdef SWIN_HAVE_AMX
// Tiles are a large state, which Linux gives only to a process that asks for it.
bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kBFloat16) == 0)
    return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

struct Found {
  bool built, runs_here;
};

const Found* builds() {
#if defined(SWIN_HAVE_AVX2) || defined(SWIN_HAVE_AVX512)
  __builtin_cpu_init();
#endif
  static const Found all[kBuilds] = {
      {true, true},
#ifdef SWIN_HAVE_AVX2
      {true, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#else
      {false, false},
#endif
#ifdef SWIN_HAVE_AVX512
      {true, has_avx512()},
#else
      {false, false},
#endif
#ifdef SWIN_HAVE_AMX
      {true, has_amx()},
#else
      {false, false},
#endif
  };
  return all;
}

}  // namespace

const char* name_of(Build build) { return kNames[build]; }

const char* select_build(Build* build) {
  const Found* all = builds();
  const char* wanted = std::getenv("SWIN_KERNELS_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (int i = kBuilds - 1; i >= 0; --i) {
    if (!all[i].built || (!any && std::strcmp(wanted, kNames[i]) != 0)) continue;
    *build = static_cast<Build>(i);
    if (all[i].runs_here) return nullptr;
    if (!any) return "names a build that this processor does not run";
  }
  return "names no build of this library; accepted are amx, avx512, avx2 and baseline, as far as they were built";
}

}  // namespace swin
