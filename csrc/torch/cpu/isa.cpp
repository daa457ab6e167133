// The name of the kernels' build that runs here.
#include "torch/cpu/cpu.h"

namespace swin_torch {
namespace {

std::string isa() { return swin::name_of(build_here()); }

}  // namespace
}  // namespace swin_torch

STABLE_TORCH_LIBRARY_FRAGMENT(swin_kernels_cpu, m) { m.def("isa() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&swin_torch::isa));
}
