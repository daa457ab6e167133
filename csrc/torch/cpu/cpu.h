// What the CPU registrations of all operators share: checks of tensors, the build that runs, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/builds.h"
#include "cpu/types.h"
#include "torch/checks.h"
#include "torch/cpu/memory.h"

namespace swin_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void require_dense(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu(), op, name, " is not on the CPU");
  require(t.is_contiguous(), op, name, " is not contiguous");
}

inline void require_shape(const char* op, const char* name, const Tensor& t, const Ints& wanted) {
  require_dense(op, name, t);
  require(shape(t) == wanted, op, name, " has shape ", text(shape(t)), "; accepted is ", text(wanted));
}

inline void require_like(const char* op, const char* name, const Tensor& t, const Tensor& like, const char* like_name) {
  require_dense(op, name, t);
  require(shape(t) == shape(like), op, name, " has shape ", text(shape(t)), "; accepted is that of ", like_name, ", ",
          text(shape(like)));
  require(t.scalar_type() == like.scalar_type(), op, name, " must have the dtype of ", like_name);
}

inline swin::ElementType element_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return swin::ElementType::kFloat32;
    case ScalarType::Double: return swin::ElementType::kFloat64;
    case ScalarType::BFloat16: return swin::ElementType::kBFloat16;
    case ScalarType::Half: return swin::ElementType::kFloat16;
    default: require(false, op, name, " has a dtype that is not float32, float64, bfloat16 or float16");
  }
  return swin::ElementType::kFloat32;
}

// Arithmetic precision of stored elements.
inline ScalarType accumulate_type(swin::ElementType type) {
  return type == swin::ElementType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

// The build of the kernels that a call runs: swin::kernel[build] for each.
inline swin::Build build_here() {
  swin::Build build;
  if (const char* error = swin::select_build(&build)) {
    const char* wanted = std::getenv("SWIN_KERNELS_ISA");
    throw std::runtime_error("SWIN_KERNELS_ISA=" + std::string(wanted ? wanted : "") + " " + error);
  }
  return build;
}

// Runs work(i) once for each of `workers`, on as many threads as there are.
template <class Work>
void run_workers(int64_t workers, const Work& work) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) work(i);
  });
}

// Runs work(scratch, next) once for each of `workers`: each has its own `bytes` of `memory`, all share the counter of
// work items.
template <class Work>
void share_items(int64_t workers, void* memory, size_t bytes, const Work& work) {
  swin::WorkCounter next{0};
  run_workers(workers, [&](int64_t i) {
    work(static_cast<void*>(static_cast<char*>(memory) + static_cast<size_t>(i) * bytes), next);
  });
}

// The same without memory: work(next).
template <class Work>
void share_items(int64_t workers, const Work& work) {
  swin::WorkCounter next{0};
  run_workers(workers, [&](int64_t) { work(next); });
}

}  // namespace swin_torch
