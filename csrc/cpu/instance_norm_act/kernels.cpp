// Compiled once per vector width with -DSWIN_ISA=<name>: the kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "cpu/instance_norm_act/kernels.h"

#include "cpu/instance_norm_act/backward.h"
#include "cpu/instance_norm_act/forward.h"

namespace swin {
namespace SWIN_ISA {

using namespace instance_norm_act;

namespace {

// Calls f<T>() for the arithmetic precision of a call.
template <class F>
void in_precision(ElementType type, const F& f) {
  if (type == ElementType::kFloat64)
    f(double());
  else
    f(float());
}

}  // namespace

void norm_partials(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) { sum_statistics<decltype(t)>(call, begin, end, scratch); });
}

void norm_statistics(const NormCall& call) {
  in_precision(call.type, [&](auto t) { join_statistics<decltype(t)>(call); });
}

void norm_apply(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      apply_blocks<T, true, true>(call, begin, end, scratch);
    else if (call.residual != nullptr)
      apply_blocks<T, true, false>(call, begin, end, scratch);
    else
      apply_blocks<T, false, false>(call, begin, end, scratch);
  });
}

void norm_backward_partials(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      sum_gradients<T, false, true>(call, begin, end, scratch);
    else if (call.x != nullptr)
      sum_gradients<T, false, false>(call, begin, end, scratch);
    else
      sum_gradients<T, true, false>(call, begin, end, scratch);
  });
}

void norm_backward_means(const NormBackwardCall& call) {
  in_precision(call.type, [&](auto t) { average_gradients<decltype(t)>(call); });
}

void norm_backward_apply(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      differentiate_blocks<T, false, true, true>(call, begin, end, scratch);
    else if (call.grad_residual != nullptr)
      differentiate_blocks<T, false, true, false>(call, begin, end, scratch);
    else if (call.x != nullptr)
      differentiate_blocks<T, false, false, false>(call, begin, end, scratch);
    else
      differentiate_blocks<T, true, false, false>(call, begin, end, scratch);
  });
}

}  // namespace SWIN_ISA
}  // namespace swin
