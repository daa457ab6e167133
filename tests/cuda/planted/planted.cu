// Small kernels, each right, and wrong in ways that the emulator must catch. They never run on a GPU.
#include <string>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace swin {
namespace {

constexpr int kThreads = 64;

enum class Fault {
  kNone,
  kMissingBarrier,
  kPastShared,        // through store_shared
  kPastSharedByHand,  // through a pointer
  kPastOutput,
  kMisaligned,
  kMissingWait,
  kReadBeforeBarrier,  // after the wait of the reading thread, before a barrier
  kOverwriteInFlight,
  kWrongFragment,
  kNotTransposed,
  kShuffleForBarrier,
  kPartedLanes,
  kPartedBlock,
  kEarlyOverwrite,
};

// Turns 64 floats around.
template <Fault fault>
__global__ void turn(const float* in, float* out) {
  auto* const tile = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  store_shared(tile + t + (fault == Fault::kPastShared ? 1 : 0), in[t]);
  if (fault == Fault::kPastSharedByHand && t == 0) reinterpret_cast<volatile float*>(tile)[kThreads] = 0.0f;
  if (fault == Fault::kMisaligned) load_shared(reinterpret_cast<const float*>(shared_memory() + 2));
  if (fault != Fault::kMissingBarrier) block_barrier();
  const float turned = load_shared(tile + kThreads - 1 - t);
  if (fault == Fault::kEarlyOverwrite) store_shared(tile + t, 0.0f);
  out[t + (fault == Fault::kPastOutput ? 1 : 0)] = turned;
}

// The same within each warp, 32 and 32.
template <Fault fault>
__global__ void turn_warps(const float* in, float* out) {
  auto* const tile = reinterpret_cast<float*>(shared_memory()) + 32 * warp_index();
  const int t = static_cast<int>(threadIdx.x), lane = lane_index();
  if (fault == Fault::kPartedBlock && warp_index() == 0) block_barrier();
  if (fault == Fault::kPartedLanes && lane < 16) shuffle_xor(t, 1);
  store_shared(tile + lane, in[t]);
  if (fault == Fault::kPartedBlock && warp_index() == 0 && lane == 0) block_barrier();
  if (fault == Fault::kShuffleForBarrier) {
    shuffle_xor(t, 1);  // all lanes meet, but memory is not ordered
  } else {
    warp_barrier();
  }
  out[t] = load_shared(tile + 31 - lane);
}

// The same on groups of four, brought by asynchronous copies in two groups, the second 16 threads behind the first.
template <Fault fault>
__global__ void turn_copies(const float* in, float* out) {
  auto* const tile = reinterpret_cast<float4*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x), pieces = kThreads / 4;
  if (t < pieces / 2) cp_async_16(tile + t, in + 4 * t, true);
  cp_async_commit();
  if (t < pieces / 2) cp_async_16(tile + pieces / 2 + t, in + 4 * (pieces / 2 + t), true);
  cp_async_commit();
  if (fault == Fault::kOverwriteInFlight && t == 0) store_shared(tile, make_float4(0, 0, 0, 0));
  if (fault == Fault::kMissingWait) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<0>();
  }
  if (fault != Fault::kReadBeforeBarrier) block_barrier();
  out[t] = load_shared(reinterpret_cast<const float*>(shared_memory()) + kThreads - 1 - t);
}

// D (16, 8) = A (16, 16) B (16, 8) in bfloat16 by one warp; `in` is A, then B, and `out` float32.
template <Fault fault>
__global__ void multiply(const BFloat16* in, float* out) {
  auto* const tile = reinterpret_cast<BFloat16*>(shared_memory());
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 16 + 16 * 8; i += 32) store_shared(tile + i, in[i]);
  warp_barrier();
  uint32_t a[4], b[2];
  ldmatrix_x4(a, tile + 16 * (lane % 16) + 8 * (lane / 16));
  const BFloat16* const row = tile + 16 * 16 + 8 * (lane % 16);
  if (fault == Fault::kNotTransposed) {
    ldmatrix_x2(b, row);
  } else {
    ldmatrix_x2_trans(b, row);
  }
  if (fault == Fault::kWrongFragment) {
    const uint32_t kept = a[1];
    a[1] = a[2];
    a[2] = kept;
  }
  float d[4] = {};
  mma_m16n8k16<BFloat16>(d, a, b[0], b[1], d);
  for (int i = 0; i < 4; ++i) out[8 * (g + 8 * (i / 2)) + 2 * t + i % 2] = d[i];
}

// One mma on registers as they lie in `in`: for each lane 4 of A, 2 of B, 4 of C.
__global__ void mma(const uint32_t* in, float* out) {
  const uint32_t* const mine = in + 10 * lane_index();
  const uint32_t a[4] = {mine[0], mine[1], mine[2], mine[3]};
  const float c[4] = {float_of(mine[6]), float_of(mine[7]), float_of(mine[8]), float_of(mine[9])};
  float d[4];
  mma_m16n8k16<BFloat16>(d, a, mine[4], mine[5], c);
  for (int i = 0; i < 4; ++i) out[4 * lane_index() + i] = d[i];
}

// The same of half the depth in float16: for each lane 2 of A, 1 of B, 4 of C.
__global__ void mma_half(const uint32_t* in, float* out) {
  const uint32_t* const mine = in + 7 * lane_index();
  const uint32_t a[2] = {mine[0], mine[1]};
  const float c[4] = {float_of(mine[3]), float_of(mine[4]), float_of(mine[5]), float_of(mine[6])};
  float d[4];
  mma_m16n8k8<Float16>(d, a, mine[2], c);
  for (int i = 0; i < 4; ++i) out[4 * lane_index() + i] = d[i];
}

// One ldmatrix of four 8 x 8 matrices; `out` holds registers.
template <bool kTransposed>
__global__ void ldmatrix(const uint32_t* in, float* out) {
  const int lane = lane_index();
  auto* const tile = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = lane; i < 4 * 32; i += 32) store_shared(tile + i, in[i]);
  warp_barrier();
  uint32_t fragment[4];
  if (kTransposed) {
    ldmatrix_x4_trans(fragment, tile + 4 * lane);
  } else {
    ldmatrix_x4(fragment, tile + 4 * lane);
  }
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_of(fragment[i]);
}

template <class Element>
using Kernel = void (*)(const Element*, float*);

template <class Element>
struct Planted {
  const char* kernel;
  const char* fault;
  Kernel<Element> function;
};

const Planted<float> kMoves[] = {
    {"turn", "none", turn<Fault::kNone>},
    {"turn", "missing barrier", turn<Fault::kMissingBarrier>},
    {"turn", "past shared memory", turn<Fault::kPastShared>},
    {"turn", "past shared memory by hand", turn<Fault::kPastSharedByHand>},
    {"turn", "past the output", turn<Fault::kPastOutput>},
    {"turn", "misaligned", turn<Fault::kMisaligned>},
    {"turn", "early overwrite", turn<Fault::kEarlyOverwrite>},
    {"turn_warps", "none", turn_warps<Fault::kNone>},
    {"turn_warps", "shuffle for barrier", turn_warps<Fault::kShuffleForBarrier>},
    {"turn_warps", "parted lanes", turn_warps<Fault::kPartedLanes>},
    {"turn_warps", "parted block", turn_warps<Fault::kPartedBlock>},
    {"turn_copies", "none", turn_copies<Fault::kNone>},
    {"turn_copies", "missing wait", turn_copies<Fault::kMissingWait>},
    {"turn_copies", "read before barrier", turn_copies<Fault::kReadBeforeBarrier>},
    {"turn_copies", "overwrite in flight", turn_copies<Fault::kOverwriteInFlight>},
};
const Planted<BFloat16> kProducts[] = {
    {"multiply", "none", multiply<Fault::kNone>},
    {"multiply", "wrong fragment", multiply<Fault::kWrongFragment>},
    {"multiply", "not transposed", multiply<Fault::kNotTransposed>},
};
const Planted<uint32_t> kInstructions[] = {
    {"mma", "none", mma},
    {"mma_half", "none", mma_half},
    {"ldmatrix", "none", ldmatrix<false>},
    {"ldmatrix", "transposed", ldmatrix<true>},
};

template <class Element, size_t count>
bool start(const Planted<Element> (&kernels)[count], int threads, int shared_bytes, const std::string& kernel,
           const std::string& fault, const void* input, void* output, const char** problem) {
  for (const Planted<Element>& one : kernels) {
    if (kernel != one.kernel || fault != one.fault) continue;
    *problem = launch(one.function, {}, threads, shared_bytes, nullptr, static_cast<const Element*>(input),
                      static_cast<float*>(output));
    return true;
  }
  return false;
}

}  // namespace
}  // namespace swin

const char* run_planted(const std::string& kernel, const std::string& fault, const void* input, void* output) {
  const char* problem = "no such planted kernel";
  swin::start(swin::kMoves, swin::kThreads, swin::kThreads * 4, kernel, fault, input, output, &problem) ||
      swin::start(swin::kProducts, 32, (16 * 16 + 16 * 8) * 2, kernel, fault, input, output, &problem) ||
      swin::start(swin::kInstructions, 32, 4 * 8 * 16, kernel, fault, input, output, &problem);
  return problem;
}
