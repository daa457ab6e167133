#include "emulator.h"

#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else  // nobody is told of red zones and of stacks
#define ASAN_POISON_MEMORY_REGION(address, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes)
static void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
static void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

emulation::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

Device device;
std::vector<Launch> launches;

namespace {

constexpr size_t kZone = 512;                 // bytes of a red zone
constexpr size_t kStack = size_t{256} << 10;  // bytes of a fiber's stack, below it a page that may not be touched
constexpr size_t kPage = 4096;
constexpr int kMostThreads = 1024;
constexpr int kMostWarps = kMostThreads / kLanes;
constexpr int kMostReports = 8;
constexpr char kWarpBarrier[] = "warp_barrier";

// ---- fibers --------------------------------------------------------------------------------------------------------

#ifdef __x86_64__
using Context = void*;  // its stack pointer
extern "C" __attribute__((visibility("hidden"))) void emulation_switch(Context* from, Context* to);
// Saves what a function must preserve on the stack in use, takes the other stack, and restores the same from there.
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulation_switch, .-emulation_switch
)");
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;  // where a call would leave its return address
  *--top = reinterpret_cast<void*>(entry);
  *context = top - 6;  // six registers of any value
}
#else
using Context = ucontext_t;
void emulation_switch(Context* from, Context* to) { swapcontext(from, to); }
void prepare(Context* context, unsigned char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStack;
  makecontext(context, entry, 0);
}
#endif

struct Copy {
  unsigned char* shared;
  const void* global;  // null for zeros
  Site site;
};

struct Thread {
  Context context = {};
  unsigned char* stack = nullptr;
  const char* waits_in = nullptr;  // null while it can run
  bool done = false;
  std::deque<std::vector<Copy>> groups{1};  // of copies; the last one is not closed yet
};

struct Warp {
  int arrived = 0;
  const char* operation = nullptr;
  uint64_t meetings = 0;
  alignas(16) unsigned char brought[2][kLanes * kMostBrought];
};

// Who touched a byte of shared memory, where, and in which phase of the warp: phases end at barriers. Zero: nobody.
struct Access {
  uint64_t phase : 38 = 0;
  uint64_t line : 14 = 0;
  uint64_t thread : 12 = 0;
  int warp() const { return static_cast<int>(thread) / kLanes; }
};

// What is remembered of a byte. Of the reads: the latest, the latest of another lane of that warp, and the latest of
// another warp; so that a write that races with any read races with one that is remembered.
struct Shadow {
  Access write, read, read_by_lane, read_by_warp;
};

Context scheduler;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
Thread threads[kMostThreads];
Warp warps[kMostWarps];
int thread_count, warp_count, running, alive, at_block_barrier;
const std::function<void()>* entry_kernel = nullptr;
std::string report;
int reports;
bool failed;

std::unique_ptr<Guarded> shared;
std::vector<Shadow> shadows;      // of every byte of shared memory
std::vector<uint16_t> in_flight;  // 1 + the thread whose copy is on its way to it
// phase[w]: the present phase of warp w. known[w][v]: the latest phase of warp v that warp w comes after.
uint64_t phase[kMostWarps], known[kMostWarps][kMostWarps], last_phase = 0;

void note(const std::string& what, const Site* site = nullptr) {
  if (reports++ >= kMostReports) return;
  char place[96];
  std::snprintf(place, sizeof place, "block (%u, %u, %u), thread %d", blockIdx.x, blockIdx.y, blockIdx.z, running);
  report += std::string(report.empty() ? "" : "\n") + place + ": " + what;
  if (!site) return;
  const std::string file = site->file_name();
  report += " (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(site->line()) + ")";
}

void to_scheduler() {
  __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes);
  emulation_switch(&threads[running].context, &scheduler);
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
}

void to_thread(int index) {
  running = index;
  threadIdx = {static_cast<unsigned>(index), 0, 0};
  __sanitizer_start_switch_fiber(nullptr, threads[index].stack, kStack);
  emulation_switch(&scheduler, &threads[index].context);
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
}

// The warps of [first, last) come after everything that any of them did.
void order(int first, int last) {
  uint64_t joined[kMostWarps] = {};
  for (int w = first; w < last; ++w) {
    known[w][w] = phase[w];
    for (int v = 0; v < warp_count; ++v) joined[v] = std::max(joined[v], known[w][v]);
  }
  for (int w = first; w < last; ++w) {
    std::copy_n(joined, warp_count, known[w]);
    last_phase = std::max(last_phase, ++phase[w]);
  }
}

void release_block_barrier() {
  if (alive == 0 || at_block_barrier < alive) return;
  at_block_barrier = 0;
  order(0, warp_count);
  for (int t = 0; t < thread_count; ++t) threads[t].waits_in = nullptr;
}

void mark_in_flight(const unsigned char* address, int mark) {
  std::fill_n(in_flight.begin() + (address - shared->data()), 16, static_cast<uint16_t>(mark));
}

void thread_entry() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*entry_kernel)();
  close_copies();
  finish_copies(0);
  threads[running].done = true;
  --alive;
  release_block_barrier();  // CUDA counts threads that have left as arrived
  to_scheduler();
  std::abort();  // nobody runs a thread that is done
}

void explain_deadlock() {
  const auto state = [](int t) { return std::string(threads[t].done ? "has left" : threads[t].waits_in); };
  std::string what = "no thread can go on:";
  for (int t = 0; t < thread_count && what.size() < 300; ++t) {
    if (t == 0 || state(t) != state(t - 1)) what += " thread " + std::to_string(t) + " and on: " + state(t) + ";";
  }
  note(what);
}

unsigned char* new_stack() {
  void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) throw std::bad_alloc();
  return static_cast<unsigned char*>(memory) + kPage;
}

void start_block() {
  std::memset(shared->data(), kPoison, shared->bytes());
  std::fill(in_flight.begin(), in_flight.end(), uint16_t{0});
  alive = thread_count;
  at_block_barrier = 0;
  for (int w = 0; w < warp_count; ++w) {  // after everything earlier blocks did
    std::fill_n(known[w], kMostWarps, last_phase);
    phase[w] = last_phase + 1;
    warps[w] = Warp{};
  }
  ++last_phase;
  for (int t = 0; t < thread_count; ++t) {
    unsigned char* const stack = threads[t].stack ? threads[t].stack : new_stack();
    ASAN_UNPOISON_MEMORY_REGION(stack, kStack);  // what a failed launch left
    threads[t] = Thread{.stack = stack};
    prepare(&threads[t].context, stack, thread_entry);
  }
}

void run_block() {
  start_block();
  while (alive > 0 && !failed) {
    bool progress = false;
    for (int i = 0; i < thread_count && !failed; ++i) {
      const int t = device.reversed ? thread_count - 1 - i : i;
      if (threads[t].done || threads[t].waits_in) continue;
      to_thread(t);
      progress = true;
    }
    if (progress) continue;
    explain_deadlock();
    failed = true;
  }
  if (shared->intact()) return;
  note("something was written just before or behind shared memory");
  failed = true;
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
  ASAN_UNPOISON_MEMORY_REGION(data_ - kZone, kZone + bytes_ + kZone);
  std::free(data_ - kZone - skew_);
}

bool Guarded::intact() const {
  bool untouched = true;
  for (unsigned char* zone : {data_ - kZone, data_ + bytes_}) {
    ASAN_UNPOISON_MEMORY_REGION(zone, kZone);
    untouched &= std::all_of(zone, zone + kZone, [](unsigned char byte) { return byte == kPoison; });
    ASAN_POISON_MEMORY_REGION(zone, kZone);
  }
  return untouched;
}

// ---- launch --------------------------------------------------------------------------------------------------------

intptr_t address_in_file(const void* kernel) {
  Dl_info file;
  dladdr(kernel, &file);
  return static_cast<const char*>(kernel) - static_cast<const char*>(file.dli_fbase);
}

const char* run(const Launch& launch, const std::function<void()>& kernel) {
  if (launch.threads < 1 || launch.threads > kMostThreads) return "launch: a block has 1 to 1024 threads";
  if (launch.shared_bytes > device.shared_per_block) return "launch: a block has less shared memory";
  launches.push_back(launch);
  if (device.dry) return nullptr;
  report.clear();
  reports = 0;
  failed = false;
  gridDim = launch.grid;
  blockDim = {static_cast<unsigned>(launch.threads), 1, 1};
  thread_count = launch.threads;
  warp_count = (thread_count + kLanes - 1) / kLanes;
  entry_kernel = &kernel;
  shared = std::make_unique<Guarded>(static_cast<size_t>(launch.shared_bytes));
  shadows.assign(shared->bytes(), Shadow{});
  in_flight.assign(shared->bytes(), 0);
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  for (uint64_t i = 0; i < blocks && !failed; ++i) {
    const auto b = static_cast<unsigned>(device.reversed ? blocks - 1 - i : i);
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    run_block();
  }
  return report.empty() ? nullptr : report.c_str();
}

// ---- what threads call ---------------------------------------------------------------------------------------------

void fail(const std::string& what, const Site* site) {
  note(what, site);
  failed = true;
  to_scheduler();
  std::abort();  // a failed launch runs nobody
}

unsigned char* shared_memory() { return shared->data(); }

void touch_shared(const void* address, size_t bytes, bool write, const Site& site) {
  const std::string verb = write ? "writes " : "reads ";
  const auto offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared->data());
  const bool outside = offset > shared->bytes() || shared->bytes() - offset < bytes;
  if (outside || offset % bytes) {
    fail(verb + std::to_string(bytes) + " bytes at " + std::to_string(static_cast<intptr_t>(offset)) + " of " +
             std::to_string(shared->bytes()) + " bytes of shared memory" + (outside ? "" : ": not aligned"),
         &site);
  }
  const int warp = running / kLanes;
  const Access mine{phase[warp], site.line(), static_cast<uint64_t>(running)};
  const auto races = [&](const Access& other) {
    return other.phase > known[warp][other.warp()] && other.thread != mine.thread;
  };
  for (size_t i = offset; i < offset + bytes; ++i) {
    Shadow& s = shadows[i];
    const Access* other = races(s.write) ? &s.write : nullptr;
    for (const Access* read : {&s.read, &s.read_by_lane, &s.read_by_warp}) {
      if (write && !other && races(*read)) other = read;
    }
    if (in_flight[i] || other) {
      const std::string byte = verb + "byte " + std::to_string(i) + " of shared memory";
      note(in_flight[i] ? byte + " while a copy by thread " + std::to_string(in_flight[i] - 1) +
                              " is on its way to it: no wait before"
                        : "race: " + byte + ", which thread " + std::to_string(other->thread) +
                              (other == &s.write ? " wrote" : " read") + " at line " + std::to_string(other->line) +
                              ": no barrier between",
           &site);
      return;
    }
    if (write) {
      s.write = mine;
    } else {
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
  to_scheduler();
}

const void* gather(const char* name, const void* mine, size_t bytes) {
  Warp& warp = warps[running / kLanes];
  if (thread_count % kLanes) fail(std::string(name) + " in a block that ends with a part of a warp");
  if (warp.arrived > 0 && std::strcmp(warp.operation, name) != 0) {
    fail(std::string("the lanes of a warp part: this one is at ") + name + ", others at " + warp.operation);
  }
  warp.operation = name;
  unsigned char* const brought = warp.brought[warp.meetings % 2];
  std::memcpy(brought + running % kLanes * bytes, mine, bytes);
  if (++warp.arrived < kLanes) {
    threads[running].waits_in = name;
    to_scheduler();
    return brought;
  }
  warp.arrived = 0;
  ++warp.meetings;
  const int index = running / kLanes;
  if (std::strcmp(name, kWarpBarrier) == 0) order(index, index + 1);
  for (int t = index * kLanes; t < (index + 1) * kLanes; ++t) threads[t].waits_in = nullptr;
  return brought;
}

void warp_barrier() { gather(kWarpBarrier, "", 1); }

void copy_later(void* destination, const void* global, bool valid, const Site& site) {
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) fail("cp_async_16 of a global address not aligned", &site);
  touch_shared(destination, 16, true, site);
  auto* const bytes = static_cast<unsigned char*>(destination);
  std::memset(bytes, kPoison, 16);  // whoever reads too early shall see it
  mark_in_flight(bytes, running + 1);
  threads[running].groups.back().push_back({bytes, valid ? global : nullptr, site});
}

void close_copies() { threads[running].groups.emplace_back(); }

void finish_copies(size_t youngest_left) {
  auto& groups = threads[running].groups;
  for (; groups.size() > youngest_left + 1; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      copy.global ? std::memcpy(copy.shared, copy.global, 16) : std::memset(copy.shared, 0, 16);
      mark_in_flight(copy.shared, 0);
      touch_shared(copy.shared, 16, true, copy.site);
    }
  }
}

}  // namespace emulation
