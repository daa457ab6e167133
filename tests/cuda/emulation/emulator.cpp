#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else  // the calls that tell AddressSanitizer of stacks and red zones say nothing to nobody
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Device device;

namespace {

constexpr size_t kZone = 512;                 // bytes of a red zone
constexpr size_t kStack = size_t{256} << 10;  // bytes of a fiber's stack, below it a page that may not be touched
constexpr size_t kPage = 4096;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kLanes;
constexpr size_t kMostReports = 8;

// ---- fibers --------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(void** from, void* to);
// Saves what a function must preserve on the stack in use, takes the other stack, and restores the same from there.
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // where a call would leave its return address
  *top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  context->stack_pointer = top - 6;  // six registers of any value
}
void switch_to(Context* from, Context* to) { emulation_switch(&from->stack_pointer, to->stack_pointer); }
#else
using Context = ucontext_t;
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
void switch_to(Context* from, Context* to) { swapcontext(from, to); }
#endif

struct Copy {
  unsigned char* shared;
  const void* global;  // null for zeros
  Site site;
};

struct Thread {
  Context context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;      // AddressSanitizer's
  const char* waits_in = nullptr;  // null while it can run
  bool done = false;
  std::vector<Copy> open;  // started and not yet in a group
  std::deque<std::vector<Copy>> groups;
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  void* brought[kLanes];
};

// ---- races ---------------------------------------------------------------------------------------------------------

// Who touched a byte, where, and in which phase of the warp: phases end at barriers. Zero: nobody.
struct Access {
  uint64_t phase : 38 = 0;
  uint64_t line : 14 = 0;
  uint64_t thread : 12 = 0;
  int warp() const { return static_cast<int>(thread) / kLanes; }
};

// What is remembered of a byte of shared memory. Of the reads: the latest, the latest of another lane of that warp, and
// the latest of another warp; so that a write that races with any read races with one that is remembered.
struct Shadow {
  Access write, read, read_by_lane, read_by_warp;
};

// ---- the state of a launch -----------------------------------------------------------------------------------------

Context scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
std::array<Thread, kMostThreads> threads;
std::array<Warp, kMostWarps> warps;
int thread_count = 0, running = 0, alive = 0, at_block_barrier = 0;
const std::function<void()>* entry_kernel = nullptr;
bool failed = false;
std::string report;
size_t reports = 0;

std::unique_ptr<Guarded> shared;
std::vector<Shadow> shadows;      // of every byte of shared memory
std::vector<uint16_t> in_flight;  // 1 + the thread whose copy is on its way to it
// phase[w]: the present phase of warp w. known[w][v]: the latest phase of warp v that warp w comes after.
uint64_t phase[kMostWarps], known[kMostWarps][kMostWarps], last_phase = 0;

int warp_count() { return (thread_count + kLanes - 1) / kLanes; }

std::string place() {
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), thread %d", blockIdx.x, blockIdx.y, blockIdx.z, running);
  return text;
}

void note(const std::string& what) {
  if (reports++ < kMostReports) report += (report.empty() ? "" : "\n") + place() + ": " + what;
}

std::string at(const Site& site) {
  const char* name = std::strrchr(site.file_name(), '/');
  return std::string(" (") + (name ? name + 1 : site.file_name()) + ":" + std::to_string(site.line()) + ")";
}

std::string byte_name(size_t offset) { return "byte " + std::to_string(offset) + " of shared memory"; }

// ---- scheduling ----------------------------------------------------------------------------------------------------

void to_scheduler(bool for_good) {
  Thread& mine = threads[running];
  __sanitizer_start_switch_fiber(for_good ? nullptr : &mine.fake_stack, scheduler_stack, scheduler_stack_bytes);
  switch_to(&mine.context, &scheduler);
  __sanitizer_finish_switch_fiber(mine.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void to_thread(int index) {
  running = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  Thread& next = threads[index];
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, next.stack, kStack);
  switch_to(&scheduler, &next.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void wait(const char* where) {
  Thread& mine = threads[running];
  mine.waits_in = where;
  to_scheduler(false);
}

// The warps of [first, first + count) come after everything that any of them did.
void order(int first, int count) {
  uint64_t joined[kMostWarps] = {};
  for (int v = 0; v < warp_count(); ++v) {
    for (int w = first; w < first + count; ++w) joined[v] = std::max(joined[v], v == w ? phase[w] : known[w][v]);
  }
  for (int w = first; w < first + count; ++w) {
    std::copy_n(joined, warp_count(), known[w]);
    last_phase = std::max(last_phase, ++phase[w]);
  }
}

void release_block_barrier() {
  if (alive == 0 || at_block_barrier < alive) return;
  at_block_barrier = 0;
  order(0, warp_count());
  for (int t = 0; t < thread_count; ++t) threads[t].waits_in = nullptr;
}

void finish(const Copy& copy) {
  if (copy.global) {
    std::memcpy(copy.shared, copy.global, 16);
  } else {
    std::memset(copy.shared, 0, 16);
  }
  const auto first = in_flight.begin() + (copy.shared - shared->data());
  std::fill(first, first + 16, uint16_t{0});
  touch_shared(copy.shared, 16, true, copy.site);
}

void thread_entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*entry_kernel)();
  close_copies();
  finish_copies(0);
  threads[running].done = true;
  --alive;
  release_block_barrier();  // CUDA counts threads that have left as arrived
  to_scheduler(true);
  std::abort();  // nobody runs a thread that is done
}

void explain_deadlock() {
  std::string what = "no thread can go on:";
  for (int t = 0, shown = 0; t < thread_count && shown < 6; ++t) {
    const auto state = [](int i) { return threads[i].done ? "has left" : threads[i].waits_in; };
    if (t > 0 && std::strcmp(state(t), state(t - 1)) == 0) continue;
    what += (shown++ ? ", thread " : " thread ") + std::to_string(t) + " and on: " + state(t);
  }
  note(what);
}

void run_block() {
  std::memset(shared->data(), kPoison, shared->bytes());
  std::fill(in_flight.begin(), in_flight.end(), uint16_t{0});
  alive = thread_count;
  at_block_barrier = 0;
  for (int w = 0; w < warp_count(); ++w) {  // after everything earlier blocks did
    std::fill_n(known[w], kMostWarps, last_phase);
    phase[w] = last_phase + 1;
    warps[w] = Warp{};
  }
  ++last_phase;
  for (int t = 0; t < thread_count; ++t) {
    Thread& thread = threads[t];
    if (!thread.stack) {
      thread.stack = static_cast<unsigned char*>(
          mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      mprotect(thread.stack, kPage, PROT_NONE);
      thread.stack += kPage;
    }
    ASAN_UNPOISON_MEMORY_REGION(thread.stack, kStack);  // what a failed launch left
    thread.waits_in = nullptr;
    thread.done = false;
    thread.open.clear();
    thread.groups.clear();
    prepare(&thread.context, thread.stack, thread_entry);
  }
  while (alive > 0 && !failed) {
    bool progress = false;
    for (int i = 0; i < thread_count && !failed; ++i) {
      const int t = device.reversed ? thread_count - 1 - i : i;
      if (threads[t].done || threads[t].waits_in) continue;
      to_thread(t);
      progress = true;
    }
    if (!progress && !failed) {
      explain_deadlock();
      failed = true;
    }
  }
  if (!shared->intact()) {
    note("something was written just before or behind shared memory");
    failed = true;
  }
}

}  // namespace

// ---- memory --------------------------------------------------------------------------------------------------------

Guarded::Guarded(size_t bytes, size_t skew) : bytes_(bytes), skew_(skew) {
  const size_t total = (2 * kZone + skew + bytes + 255) / 256 * 256;
  auto* begin = static_cast<unsigned char*>(std::aligned_alloc(256, total));
  if (!begin) throw std::bad_alloc();
  std::memset(begin, kPoison, total);
  data_ = begin + kZone + skew;
  ASAN_POISON_MEMORY_REGION(data_ - kZone, kZone);
  ASAN_POISON_MEMORY_REGION(data_ + bytes, kZone);
}

Guarded::~Guarded() {
  ASAN_UNPOISON_MEMORY_REGION(data_ - kZone, kZone);
  ASAN_UNPOISON_MEMORY_REGION(data_ + bytes_, kZone);
  std::free(data_ - kZone - skew_);
}

bool Guarded::contains(const void* address, size_t bytes) const {
  const auto first = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(data_);
  return first >= begin && first + bytes <= begin + bytes_;
}

bool Guarded::intact() const {
  unsigned char* const zones[] = {data_ - kZone, data_ + bytes_};
  bool untouched = true;
  for (unsigned char* zone : zones) {
    ASAN_UNPOISON_MEMORY_REGION(zone, kZone);
    untouched &= std::all_of(zone, zone + kZone, [](unsigned char byte) { return byte == kPoison; });
    ASAN_POISON_MEMORY_REGION(zone, kZone);
  }
  return untouched;
}

// ---- launch --------------------------------------------------------------------------------------------------------

const char* run(const Dim& grid, int threads_per_block, int64_t shared_bytes, const std::function<void()>& kernel) {
  report.clear();
  reports = 0;
  failed = false;
  if (threads_per_block < 1 || threads_per_block > kMostThreads) return "launch: 1 to 1024 threads make a block";
  if (shared_bytes < 0 || shared_bytes > device.shared_per_block)
    return "launch: more shared memory than a block may have";
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads_per_block), 1, 1};
  thread_count = threads_per_block;
  entry_kernel = &kernel;
  shared = std::make_unique<Guarded>(static_cast<size_t>(shared_bytes));
  shadows.assign(shared->bytes(), Shadow{});
  in_flight.assign(shared->bytes(), 0);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !failed; ++i) {
    const uint64_t b = device.reversed ? blocks - 1 - i : i;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
  }
  if (reports > kMostReports) report += "\nand " + std::to_string(reports - kMostReports) + " reports more";
  return report.empty() ? nullptr : report.c_str();
}

// ---- what threads call ---------------------------------------------------------------------------------------------

void fail(const std::string& what) {
  note(what);
  failed = true;
  to_scheduler(true);
  std::abort();  // a failed launch runs nobody
}

unsigned char* shared_memory() { return shared->data(); }

void touch_shared(const void* address, size_t bytes, bool write, const Site& site) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(address) - shared->data();
  if (!shared->contains(address, bytes)) {
    fail((write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
         std::to_string(shared->bytes()) + " bytes of shared memory" + at(site));
  }
  if (offset % static_cast<ptrdiff_t>(bytes)) {
    fail("an access of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
         " of shared memory is not aligned" + at(site));
  }
  const int warp = running / kLanes;
  Access mine;
  mine.phase = phase[warp];
  mine.line = site.line();
  mine.thread = running;
  const auto races = [&](const Access& other) {
    return other.phase > known[warp][other.warp()] && other.thread != mine.thread;
  };
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadows[i];
    const Access* other = races(s.write) ? &s.write : nullptr;
    if (write && !other) {
      for (const Access* read : {&s.read, &s.read_by_lane, &s.read_by_warp}) other = races(*read) ? read : other;
    }
    if (in_flight[i]) {
      note("touches " + byte_name(i) + at(site) + " while a copy by thread " + std::to_string(in_flight[i] - 1) +
           " is on its way: no wait before");
      return;
    }
    if (other) {
      note("race: " + std::string(write ? "writes " : "reads ") + byte_name(i) + at(site) + ", which thread " +
           std::to_string(other->thread) + (other == &s.write ? " wrote" : " read") + " at line " +
           std::to_string(other->line) + "; no barrier between");
      return;
    }
    if (write) {
      s.write = mine;
    } else if (s.read.thread != mine.thread || s.read.phase != mine.phase) {
      if (s.read.warp() != warp) {
        s.read_by_warp = s.read;
        s.read_by_lane = Access{};
      } else if (s.read.thread != mine.thread) {
        s.read_by_lane = s.read;
      }
      s.read = mine;
    }
  }
}

void block_barrier() {
  ++at_block_barrier;
  threads[running].waits_in = "block_barrier";
  release_block_barrier();
  to_scheduler(false);
}

void meet(const char* name, void* mine, void (*compute)(void* const (&lanes)[kLanes])) {
  Warp& warp = warps[running / kLanes];
  if (thread_count % kLanes) fail(std::string(name) + ": the block ends with a part of a warp");
  if (warp.arrived > 0 && std::strcmp(warp.operation, name) != 0) {
    fail(std::string("the lanes of a warp part: this one is at ") + name + ", others at " + warp.operation);
  }
  warp.operation = name;
  warp.brought[running % kLanes] = mine;
  if (++warp.arrived < kLanes) {
    wait(name);
    return;
  }
  compute(warp.brought);
  warp.arrived = 0;
  const int first = running / kLanes * kLanes;
  for (int t = first; t < first + kLanes; ++t) threads[t].waits_in = nullptr;
}

void warp_barrier() {
  meet("warp_barrier", nullptr, [](void* const(&)[kLanes]) { order(running / kLanes, 1); });
}

void copy_later(void* destination, const void* global, bool valid, const Site& site) {
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) {
    fail("cp_async_16: the global address is no multiple of 16" + at(site));
  }
  touch_shared(destination, 16, true, site);
  auto* const bytes = static_cast<unsigned char*>(destination);
  std::memset(bytes, kPoison, 16);  // whoever reads too early shall see it
  const auto first = in_flight.begin() + (bytes - shared->data());
  std::fill(first, first + 16, static_cast<uint16_t>(running + 1));
  threads[running].open.push_back({bytes, valid ? global : nullptr, site});
}

void close_copies() {
  Thread& mine = threads[running];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void finish_copies(size_t youngest_left) {
  std::deque<std::vector<Copy>>& groups = threads[running].groups;
  for (; groups.size() > youngest_left; groups.pop_front()) {
    for (const Copy& copy : groups.front()) finish(copy);
  }
}

}  // namespace emulation
