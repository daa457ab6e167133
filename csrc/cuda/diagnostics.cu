#include <cxxabi.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>
#include <set>

#include "cuda/diagnostics.h"

namespace swin {

std::atomic<int> trace_descriptor{-1};

const char* traced(const std::string& kernel, const std::function<const char*()>& run) {
  const std::string line = kernel + "\n";
  // One write, so that lines of several threads do not mix. A lost line is no reason to fail a call.
  [[maybe_unused]] const ssize_t written = write(trace_descriptor, line.data(), line.size());
  const char* const error = run();
  return error ? lasting_text(kernel + ": " + error) : nullptr;
}

std::string readable_kernel_name(const char* mangled) {
  char* const demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, nullptr);
  if (demangled == nullptr) return mangled;
  std::string name = demangled;
  std::free(demangled);
  const auto replace = [&](const std::string& part, const char* by) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.replace(at, part.size(), by);
  };
  if (name.rfind("void ", 0) == 0) name.erase(0, 5);
  replace("swin::", "");
  replace("(anonymous namespace)::", "");
  replace("__nv_bfloat16", "BFloat16");
  replace("__half", "Float16");
  return name.substr(0, name.rfind('('));
}

const char* lasting_text(const std::string& text) {
  static std::mutex mutex;
  static auto* const texts = new std::set<std::string>;  // never destroyed, even at exit; each text is kept once
  const std::lock_guard<std::mutex> lock(mutex);
  return texts->insert(text).first->c_str();
}

}  // namespace swin

void swin_cuda_trace_launches(int fd) { swin::trace_descriptor = fd; }
