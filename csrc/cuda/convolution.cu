// The 3 x 3 x 3 convolution of channels-last volumes over a concatenation that is not written, in 16-bit types.
//
// A block computes 4 x 4 x 16 voxels of 48 output channels as an implicit matrix product: it loads the 6 x 6 x 18
// voxels that those reach into shared memory once for every 48 input channels, and all 27 taps read them there, while
// the weights of the taps stream through three buffers. The tensor cores bind: a step of 16 input channels is 24
// products of a warp and 7 reads of fragments. Three blocks share a multiprocessor, so that one loads its halo while
// two compute; that leaves each 76 KB and 168 registers per thread.
#include "cuda/convolution.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace swin {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;  // a warp computes one plane of the tile
// Voxels of a block, a row of which along the last axis is the 16 rows of a product; and those that they reach.
constexpr int kPlanes = kWarps, kRows = 4, kWidth = 16;
constexpr int kReachPlanes = kPlanes + 2, kReachRows = kRows + 2, kReachWidth = kWidth + 2;
constexpr int kChannels = 48;  // input channels that pass by at a time, and output channels of a block
constexpr int kSteps = kChannels / 16, kColumns = kChannels / 8, kTaps = 27;
constexpr int kPieces = kChannels / 8;  // of 16 bytes, of a voxel
constexpr int kVoxelBytes = 16 * kPieces, kRowBytes = kReachWidth * kVoxelBytes;
constexpr int kHaloBytes = kReachPlanes * kReachRows * kRowBytes;
constexpr int kTapBytes = kChannels * kVoxelBytes, kTapPieces = kChannels * kPieces;
constexpr int kTapBuffers = 3;  // a tap is computed, the next has arrived, the one after is on its way
constexpr int kSharedBytes = kHaloBytes + kTapBuffers * kTapBytes;

struct Convolution {
  const void* x;       // (B, D, H, W, channels)
  const void* skip;    // (B, D, H, W, skip_channels); not read without channels
  const void* weight;  // (out_channels / 48, (channels + skip_channels) / 48, 27, 48 of the output, 48 of the input)
  void* out;           // (B, D, H, W, out_channels)
  int channels, skip_channels, out_channels;
  int spatial[kAxes], tiles[kAxes];
};

// Byte at which piece `piece` of a row lies, in rows of 96 bytes from a common start. Eight consecutive rows would
// collide in four groups of banks; every other four rows swap the pieces of a pair, which avoids that.
SWIN_DEVICE int place(int row, int piece) { return row * kVoxelBytes + (piece ^ (row >> 2 & 1)) * 16; }

// What a block computes.
struct Tile {
  int64_t volume;    // instance of the batch
  int begin[kAxes];  // first voxel
  int part;          // output channels from 48 * part on
};

SWIN_DEVICE Tile locate(const Convolution& call) {
  // Blocks that read the same voxels are consecutive, so that the second finds them in the L2 cache.
  const unsigned parts = static_cast<unsigned>(call.out_channels / kChannels);
  unsigned index = blockIdx.x / parts;
  Tile tile;
  tile.part = static_cast<int>(blockIdx.x - index * parts);
  SWIN_UNROLL
  for (int axis = kAxes - 1; axis >= 0; --axis) {
    const unsigned tiles = static_cast<unsigned>(call.tiles[axis]);
    const int extent = axis == 0 ? kPlanes : axis == 1 ? kRows : kWidth;
    tile.begin[axis] = static_cast<int>(index % tiles) * extent;
    index /= tiles;
  }
  tile.volume = static_cast<int64_t>(index);
  return tile;
}

// Index of a voxel among those of all volumes.
SWIN_DEVICE int64_t voxel_index(const Convolution& call, int64_t volume, int z, int y, int x) {
  return ((volume * call.spatial[0] + z) * call.spatial[1] + y) * call.spatial[2] + x;
}

// Starts to load 48 channels, from `first` on, of the voxels that `tile` reaches; zeros beyond the volume.
template <class T>
SWIN_DEVICE void start_halo(const Convolution& call, const Tile& tile, int first, unsigned char* halo) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread >= kReachWidth * kPieces) return;  // a thread loads the same piece of every row of voxels
  const bool of_x = first < call.channels;
  const int channels = of_x ? call.channels : call.skip_channels;
  const T* source = static_cast<const T*>(of_x ? call.x : call.skip) + (of_x ? first : first - call.channels);
  const int voxel = thread / kPieces, piece = thread - voxel * kPieces;
  const int z0 = tile.begin[0] - 1, y0 = tile.begin[1] - 1, x = tile.begin[2] + voxel - 1;
  const bool inside = x >= 0 && x < call.spatial[2];
  const int64_t row_elements = static_cast<int64_t>(call.spatial[2]) * channels;
  unsigned char* target = halo + place(voxel, piece);
  int64_t begin = voxel_index(call, tile.volume, z0, y0, x) * channels + piece * 8;  // of the plane's first row
  SWIN_NO_UNROLL
  for (int z = z0; z < z0 + kReachPlanes; ++z) {
    const bool in_plane = inside && z >= 0 && z < call.spatial[0];
    int64_t at = begin;
    SWIN_UNROLL
    for (int row = 0; row < kReachRows; ++row) {
      const bool valid = in_plane && y0 + row >= 0 && y0 + row < call.spatial[1];
      cp_async_16(target + row * kRowBytes, source + (valid ? at : 0), valid);
      at += row_elements;
    }
    begin += row_elements * call.spatial[1];
    target += kReachRows * kRowBytes;
  }
}

// Starts to load the weights of one tap.
template <class T>
SWIN_DEVICE void start_tap(const T* weight, unsigned char* buffer) {
  constexpr int kTurns = 3, kTogether = kChannels / kTurns;  // a multiple of 8: `place` is the same in every turn
  const int thread = static_cast<int>(threadIdx.x), row = thread / kPieces, piece = thread - row * kPieces;
  if (thread >= kTapPieces / kTurns) return;
  SWIN_UNROLL
  for (int i = 0; i < kTurns; ++i) {
    cp_async_16(buffer + place(row, piece) + i * kTogether * kVoxelBytes,
                weight + thread * 8 + i * kTogether * kChannels, true);
  }
}

// Adds one tap: `voxels` is where this lane reads the first row of voxels, `weights` where it reads the weights.
template <class T>
SWIN_DEVICE void add_tap(float (&sums)[kRows][kColumns][4], const unsigned char* voxels, const unsigned char* weights) {
  SWIN_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    uint32_t b[kColumns / 2][4];
    SWIN_UNROLL
    for (int pair = 0; pair < kColumns / 2; ++pair) {
      ldmatrix_x4(b[pair], weights + pair * 16 * kVoxelBytes + step * 32);
    }
    SWIN_UNROLL
    for (int row = 0; row < kRows; ++row) {
      uint32_t a[4];
      ldmatrix_x4(a, voxels + row * kRowBytes + step * 32);
      SWIN_UNROLL
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t (&pair)[4] = b[column / 2];
        mma_m16n8k16<T>(sums[row][column], a, pair[column % 2 * 2], pair[column % 2 * 2 + 1], sums[row][column]);
      }
    }
  }
}

// Writes the sums of a warp, transposed in `scratch` so that a lane stores 16 bytes.
template <class T>
SWIN_DEVICE void write(const Convolution& call, const Tile& tile, const float (&sums)[kRows][kColumns][4],
                       unsigned char* scratch) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  SWIN_UNROLL
  for (int row = 0; row < kRows; ++row) {
    unsigned char* rows = scratch + row * kWidth * kVoxelBytes;
    SWIN_UNROLL
    for (int column = 0; column < kColumns; ++column) {
      const float (&sum)[4] = sums[row][column];
      store_shared(reinterpret_cast<uint32_t*>(rows + place(g, column)) + t, pack<T>(sum[0], sum[1]));
      store_shared(reinterpret_cast<uint32_t*>(rows + place(g + 8, column)) + t, pack<T>(sum[2], sum[3]));
    }
  }
  warp_barrier();
  const int z = tile.begin[0] + warp_index();
  if (z >= call.spatial[0]) return;
  SWIN_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const int y = tile.begin[1] + row;
    if (y >= call.spatial[1]) return;
    SWIN_UNROLL
    for (int i = 0; i < kWidth * kPieces / 32; ++i) {
      const int index = lane_index() + 32 * i, voxel = index / kPieces, piece = index - voxel * kPieces;
      const int x = tile.begin[2] + voxel;
      if (x >= call.spatial[2]) continue;
      T* out = static_cast<T*>(call.out) + voxel_index(call, tile.volume, z, y, x) * call.out_channels;
      const unsigned char* from = scratch + row * kWidth * kVoxelBytes + place(voxel, piece);
      *reinterpret_cast<uint4*>(out + tile.part * kChannels + piece * 8) =
          load_shared(reinterpret_cast<const uint4*>(from));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3) convolve(const Convolution call) {
  unsigned char* halo = shared_memory();
  unsigned char* buffers = halo + kHaloBytes;
  const Tile tile = locate(call);
  const int channels = call.channels + call.skip_channels, taps = channels / kChannels * kTaps;
  constexpr int kTapElements = kChannels * kChannels;
  const T* weight = static_cast<const T*>(call.weight) + static_cast<int64_t>(tile.part) * taps * kTapElements;

  // Where this lane reads fragments: of the voxels for each offset along the last axis, and of the weights.
  const int lane = lane_index();
  int voxels[3];
  SWIN_UNROLL
  for (int dx = 0; dx < 3; ++dx) {
    voxels[dx] = warp_index() * kReachRows * kRowBytes + place(lane % 16 + dx, lane / 16);
  }
  const unsigned char* weights = buffers + place(lane / 16 * 8 + lane % 8, lane / 8 % 2);

  float sums[kRows][kColumns][4] = {};
  int started = 0;  // taps, of all chunks of input channels
  const auto start_next = [&](unsigned char* buffer) {
    if (started < taps) start_tap(weight, buffer);
    weight += kTapElements, ++started;
    cp_async_commit();
  };
  start_next(buffers);
  start_next(buffers + kTapBytes);
  SWIN_NO_UNROLL
  for (int first = 0; first < channels; first += kChannels) {
    if (first > 0) block_barrier();  // nobody reads the halo any more
    start_halo<T>(call, tile, first, halo);
    cp_async_commit();
    cp_async_wait<0>();
    SWIN_NO_UNROLL
    for (int row = 0; row < 9; ++row) {  // of three taps along the last axis
      const unsigned char* at = halo + (row / 3 * kReachRows + row % 3) * kRowBytes;
      SWIN_UNROLL
      for (int dx = 0; dx < 3; ++dx) {
        cp_async_wait<1>();
        block_barrier();  // all threads have this tap, and its predecessor's buffer is free
        start_next(buffers + (dx + 2) % kTapBuffers * kTapBytes);
        add_tap<T>(sums, at + voxels[dx], weights + dx * kTapBytes);
      }
    }
  }
  block_barrier();  // the halo becomes scratch memory
  write<T>(call, tile, sums, halo + warp_index() * kRows * kWidth * kVoxelBytes);
}

}  // namespace
}  // namespace swin

const char* swin_cuda_convolution(const SwinConvolution* call, const void* x, const void* skip, const void* weight,
                                  void* out, void* stream) {
  using namespace swin;
  Convolution given{x, skip, weight, out, 0, 0, 0, {}, {}};
  const int64_t channels[] = {call->channels, call->skip_channels, call->out_channels};
  for (const int64_t count : channels) {
    if (count < 0 || count % kChannels != 0 || count > INT32_MAX / 4) {
      return "convolution: channels are not multiples of 48";
    }
  }
  if (call->channels == 0 || call->out_channels == 0) return "convolution: there are no channels";
  given.channels = static_cast<int>(call->channels);
  given.skip_channels = static_cast<int>(call->skip_channels);
  given.out_channels = static_cast<int>(call->out_channels);
  LaunchGrid blocks;
  blocks.x = call->batch * (call->out_channels / kChannels);
  for (int axis = 0; axis < kAxes; ++axis) {
    if (call->spatial[axis] < 1 || call->spatial[axis] > INT32_MAX / 2) {
      return "convolution: an axis is empty or has more than 2^30 voxels";
    }
    given.spatial[axis] = static_cast<int>(call->spatial[axis]);
    const int extent = axis == 0 ? kPlanes : axis == 1 ? kRows : kWidth;
    given.tiles[axis] = (given.spatial[axis] + extent - 1) / extent;
    if (blocks.x > INT32_MAX / given.tiles[axis]) return "convolution: more than 2^31 - 1 blocks of 256 voxels";
    blocks.x *= given.tiles[axis];
  }
  if (call->batch == 0) return nullptr;
  switch (call->element) {
    case kSwinBFloat16: return launch(convolve<BFloat16>, blocks, kThreads, kSharedBytes, stream, given);
    case kSwinFloat16: return launch(convolve<Float16>, blocks, kThreads, kSharedBytes, stream, given);
    default: return "convolution: the kernel is for bfloat16 and float16";
  }
}
