// Everything the kernels ask of the hardware: one small function per instruction, and nothing else.
//
// Kernels include no CUDA headers themselves and contain no assembly, so that the whole of csrc/cuda also compiles for
// a CPU: tests/cuda/emulation/cuda/ptx.h has the same functions with the hardware's fragment layouts. Besides what is
// declared here kernels use only threadIdx, blockIdx, blockDim, gridDim, __global__, __device__, __forceinline__,
// __launch_bounds__, __restrict__, uint2, uint4, float2, float4 and fmaf, fmaxf, fminf, log2f.
//
// All memory of a block comes from shared_memory(). It is reached through load_shared and store_shared, or by
// cp_async_16 and ldmatrix; a pointer into it is never dereferenced by hand (the race checker of the tests watches
// these functions).
//
// Fragments of mma m16n8k16, with g = lane / 4 and t = lane % 4, two 16-bit values per register, the lower half first:
//   a[0] = A[g][2t, 2t+1]  a[1] = A[g+8][2t, 2t+1]  a[2] = A[g][2t+8, 2t+9]  a[3] = A[g+8][2t+8, 2t+9]
//   b0 = B[2t, 2t+1][g]    b1 = B[2t+8, 2t+9][g]
//   d[0, 1] = D[g][2t, 2t+1]    d[2, 3] = D[g+8][2t, 2t+1]
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define SWIN_DEVICE static __device__ __forceinline__
#define SWIN_UNROLL _Pragma("unroll")
#define SWIN_NO_UNROLL _Pragma("unroll 1")

namespace swin {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// ---- threads -------------------------------------------------------------------------------------------------------

SWIN_DEVICE int lane_index() { return static_cast<int>(threadIdx.x & 31); }
SWIN_DEVICE int warp_index() { return static_cast<int>(threadIdx.x >> 5); }

// All threads of the block meet, and see each other's writes to shared memory.
SWIN_DEVICE void block_barrier() { __syncthreads(); }

// The same for the 32 threads of a warp.
SWIN_DEVICE void warp_barrier() { __syncwarp(); }

// `value` of thread `lane` of the warp.
template <class T>
SWIN_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// `value` of the thread whose lane differs in the bits of `mask`.
template <class T>
SWIN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether `predicate` holds for any thread of the warp.
SWIN_DEVICE bool warp_any(bool predicate) { return __any_sync(0xffffffffu, predicate) != 0; }

// `value`, in a way that hides from the compiler how it was computed, so that it stays in a register instead of being
// computed again in every turn of a loop.
SWIN_DEVICE int kept(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// The dynamic shared memory of the block, aligned to 128 bytes.
SWIN_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char swin_shared_memory[];
  return swin_shared_memory;
}

SWIN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// T is any plain type of 1, 2, 4, 8 or 16 bytes, aligned to its size.
template <class T>
SWIN_DEVICE T load_shared(const T* pointer) {
  return *pointer;
}

template <class T>
SWIN_DEVICE void store_shared(T* pointer, T value) {
  *pointer = value;
}

// Starts to copy 16 bytes from global to shared memory; zeros where `valid` is false, and `global` is then not read.
SWIN_DEVICE void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile(
      "{ .reg .pred ignored; setp.eq.s32 ignored, %2, 0;\n"
      "cp.async.cg.shared.global [%0], [%1], 16, ignored; }" ::"r"(shared_address(shared)),
      "l"(global), "r"(static_cast<int>(valid))
      : "memory");
}

// Closes the group of copies that this thread started since the last call.
SWIN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the youngest `Groups` groups of this thread have arrived; other threads see them after a barrier.
template <int Groups>
SWIN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
}

// Four 8 x 8 matrices of 16-bit values. Lane 8 m + r brings the address of row r (16 bytes) of matrix m;
// fragment[m] of lane 4 g + t is row g, columns 2t and 2t+1 of matrix m.
SWIN_DEVICE void ldmatrix_x4(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same for the transposed matrices: fragment[m] of lane 4 g + t is column g, rows 2t and 2t+1 of matrix m.
SWIN_DEVICE void ldmatrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two matrices; the addresses of lanes 16 to 31 are not used.
SWIN_DEVICE void ldmatrix_x2(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

SWIN_DEVICE void ldmatrix_x2_trans(uint32_t (&fragment)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(fragment[0]), "=r"(fragment[1])
               : "r"(shared_address(row))
               : "memory");
}

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// D = A B + C, 16 x 8 x 16, 16-bit factors of type T, float32 sums; `d` and `c` may be the same array.
template <class T>
SWIN_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_m16n8k16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                       const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                                      const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// The same at half the depth, 16 x 8 x 8, with the fragments' first halves.
template <class T>
SWIN_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, const float (&c)[4]);

template <>
__device__ __forceinline__ void mma_m16n8k8<Float16>(float (&d)[4], const uint32_t (&a)[2], uint32_t b,
                                                     const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 2^x to about 2 units in the last place; results below 2^-126 are zero.
SWIN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x) to about 2^-22, absolute between 0.5 and 2 and relative beyond; a subnormal x counts as zero.
SWIN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to one unit in the last place; infinite for a subnormal x.
SWIN_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

SWIN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
SWIN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// ---- 16-bit values -------------------------------------------------------------------------------------------------

SWIN_DEVICE float to_float(float x) { return x; }
SWIN_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
SWIN_DEVICE float to_float(Float16 x) { return __half2float(x); }

// The nearest value of type T, ties to even.
template <class T>
SWIN_DEVICE T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ Float16 from_float<Float16>(float x) {
  return __float2half_rn(x);
}

// Two values of type T in a register, the first in the lower half; rounded to nearest, ties to even.
template <class T>
SWIN_DEVICE uint32_t pack(float lower, float upper);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float lower, float upper) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float lower, float upper) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(upper), "f"(lower));
  return packed;
}

// The two values of such a register.
template <class T>
SWIN_DEVICE float2 unpack(uint32_t packed);

template <>
__device__ __forceinline__ float2 unpack<BFloat16>(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 unpack<Float16>(uint32_t packed) {
  return make_float2(__half2float(__ushort_as_half(static_cast<unsigned short>(packed & 0xffffu))),
                     __half2float(__ushort_as_half(static_cast<unsigned short>(packed >> 16))));
}

}  // namespace swin
