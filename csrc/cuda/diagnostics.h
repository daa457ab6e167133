// What tells callers more about a call: the trace of its launches, and error texts that are built when needed.
// No CUDA types: the emulation of tests/cuda uses the same.
#pragma once

#include <atomic>
#include <functional>
#include <string>

namespace swin {

// The file descriptor that every launch writes a line to; negative for none: see swin_cuda_trace_launches.
extern std::atomic<int> trace_descriptor;

inline bool is_traced() { return trace_descriptor.load(std::memory_order_relaxed) >= 0; }

// Writes `kernel` as a line of the trace, then calls `run`, which starts the kernel, waits for it and returns nullptr
// or what went wrong. Returns nullptr, or the name of the kernel followed by what went wrong.
const char* traced(const std::string& kernel, const std::function<const char*()>& run);

// The mangled name of a kernel in the form `attend<BFloat16, 16>`.
std::string readable_kernel_name(const char* mangled);

// The same text, valid for the life of the process.
const char* lasting_text(const std::string& text);

}  // namespace swin

// From here on every launch of the process writes the name of its kernel as a line to the file descriptor `fd` before
// it starts, and waits for the stream after it, unless the stream is being captured: whatever goes wrong is then the
// error of that launch, and begins with the name. A negative `fd` ends this.
extern "C" void swin_cuda_trace_launches(int fd);
