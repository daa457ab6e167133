// Runs CUDA kernels on the CPU, for tests: one block at a time, every thread of it a fiber.
//
// It is slow and strict on purpose. Shared memory lies between red zones and holds NaN when a block starts; a copy by
// cp.async arrives no sooner than the wait for it; two threads that touch the same byte of shared memory, one of them
// writing, without a barrier between them are reported. Of the instructions of a warp only its barrier orders memory,
// as the PTX memory model has it: shuffles, votes, ldmatrix and mma do not.
#pragma once

#include <cstdint>
#include <cstdio>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace emulation {

constexpr int kLanes = 32;
constexpr int kMostBrought = 64;         // bytes of a lane
constexpr unsigned char kPoison = 0xff;  // every float32, bfloat16 and float16 made of it is NaN

using Site = std::source_location;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Memory filled with poison between two zones that nobody may touch: AddressSanitizer stops at the first touch, without
// it intact() tells of writes. Begins `skew` bytes behind a multiple of 256.
class Guarded {
 public:
  explicit Guarded(size_t bytes, size_t skew = 0);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool intact() const;

 private:
  size_t bytes_, skew_;
  unsigned char* data_;
};

// What device_limits reports, and in which order blocks and threads take turns. A kernel must not depend on the order.
struct Device {
  int compute_capability = 90;
  int multiprocessors = 2;
  int shared_per_block = 227 << 10;
  int shared_per_multiprocessor = 228 << 10;
  bool reversed = false;
  bool dry = false;  // launches are noted and not run
};
extern Device device;

struct Launch {
  const void* kernel;
  Dim grid;
  int threads;
  int64_t shared_bytes;
};
extern std::vector<Launch> launches;  // all since someone cleared it

// Address of a kernel within the file of the emulation, as `nm` shows it.
intptr_t address_in_file(const void* kernel);

// Runs `kernel` for every thread of every block. Returns nullptr, or what went wrong (valid until the next call).
const char* run(const Launch& launch, const std::function<void()>& kernel);

// What follows is called by a running thread.

[[noreturn]] void fail(const std::string& what, const Site* site = nullptr);  // ends the launch
unsigned char* shared_memory();
void touch_shared(const void* address, size_t bytes, bool write, const Site& site);
void block_barrier();
void warp_barrier();

// Meets the other lanes of the warp, all with the same `name` and number of bytes, of kMostBrought at most. Returns
// what each brought, lane after lane; it stays until the warp meets for the second time from here.
const void* gather(const char* name, const void* mine, size_t bytes);

void copy_later(void* shared, const void* global, bool valid, const Site& site);
void close_copies();
void finish_copies(size_t youngest_left);

}  // namespace emulation

extern emulation::Dim threadIdx, blockIdx, blockDim, gridDim;
