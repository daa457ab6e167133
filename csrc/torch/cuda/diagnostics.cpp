// The trace of launches as a torch operator.
#include "cuda/diagnostics.h"

#include "torch/cuda/cuda.h"

namespace swin_torch {
namespace {

void trace_launches(int64_t fd) {
  require(fd >= -1 && fd <= INT32_MAX, "trace_launches", "fd is ", fd, "; accepted are file descriptors, and -1");
  swin_cuda_trace_launches(static_cast<int>(fd));
}

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cuda, m) { m.def("trace_launches(int fd) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("trace_launches", TORCH_BOX(&swin_torch::trace_launches));
}
