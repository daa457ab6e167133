// The builds of the kernels, one for each instruction set, and how to call a kernel of the build that runs here.
//
// A kernels.cpp is compiled once for each build, with -DSWIN_ISA=<its name>, and defines its kernels in
// swin::SWIN_ISA. SWIN_KERNEL declares one of them, for all builds, to its callers:
//
//   SWIN_KERNEL(scale, void(const float* x, int64_t count, float factor, float* y));  // in namespace swin
//   ...
//   swin::scale[build](x, count, 2, y);  // with the build that select_build() gave
//
// The linker finds a kernel by its name and parameters: if a build lacks one, linking fails.
#pragma once

namespace swin {

// Narrowest first.
enum Build { kBaseline, kAvx2, kAvx512, kAmx, kBuilds };

// Sets `build` to the widest that this processor can run, or to the one that SWIN_KERNELS_ISA names. Returns nullptr,
// or what is wrong with that name.
const char* select_build(Build* build);

const char* name_of(Build build);

template <class Signature>
using Function = Signature;

template <class Signature>
using Kernel = Signature* const[kBuilds];

}  // namespace swin

// setup.py defines SWIN_HAVE_<build> for every build but the baseline. These take a declaration, or a pointer.
#define SWIN_OMITTED(text)
#define SWIN_GIVEN(text) text
#define SWIN_NULL(pointer) nullptr
#ifdef SWIN_HAVE_AVX2
#define SWIN_DECLARE_AVX2 SWIN_GIVEN
#define SWIN_POINT_TO_AVX2 SWIN_GIVEN
#else
#define SWIN_DECLARE_AVX2 SWIN_OMITTED
#define SWIN_POINT_TO_AVX2 SWIN_NULL
#endif
#ifdef SWIN_HAVE_AVX512
#define SWIN_DECLARE_AVX512 SWIN_GIVEN
#define SWIN_POINT_TO_AVX512 SWIN_GIVEN
#else
#define SWIN_DECLARE_AVX512 SWIN_OMITTED
#define SWIN_POINT_TO_AVX512 SWIN_NULL
#endif
#ifdef SWIN_HAVE_AMX
#define SWIN_DECLARE_AMX SWIN_GIVEN
#define SWIN_POINT_TO_AMX SWIN_GIVEN
#else
#define SWIN_DECLARE_AMX SWIN_OMITTED
#define SWIN_POINT_TO_AMX SWIN_NULL
#endif

#define SWIN_DECLARE_BUILDS(name, signature)                      \
  namespace baseline {                                            \
  Function<signature> name;                                       \
  }                                                               \
  SWIN_DECLARE_AVX2(namespace avx2 { Function<signature> name; }) \
  SWIN_DECLARE_AVX512(namespace avx512 { Function<signature> name; })

// A kernel of kernels.cpp. The AMX build uses that of AVX-512.
#define SWIN_KERNEL(name, signature)                                                  \
  SWIN_DECLARE_BUILDS(name, signature)                                                \
  constexpr Kernel<signature> name = {baseline::name, SWIN_POINT_TO_AVX2(avx2::name), \
                                      SWIN_POINT_TO_AVX512(avx512::name), SWIN_POINT_TO_AMX(avx512::name)}

// One that kernels_amx.cpp has too.
#define SWIN_KERNEL_ALSO_ON_AMX(name, signature)                                      \
  SWIN_DECLARE_BUILDS(name, signature)                                                \
  SWIN_DECLARE_AMX(namespace amx { Function<signature> name; })                       \
  constexpr Kernel<signature> name = {baseline::name, SWIN_POINT_TO_AVX2(avx2::name), \
                                      SWIN_POINT_TO_AVX512(avx512::name), SWIN_POINT_TO_AMX(amx::name)}
