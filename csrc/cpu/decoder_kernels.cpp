// Compiled once per vector width with -DSWIN_ISA=<name>; offers the decoder's kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "convolution.h"
#include "convolution_weight_gradient.h"
#include "decoder.h"
#include "instance_norm_act.h"

#ifndef SWIN_ISA
#error "define SWIN_ISA to the name of this build"
#endif
#define SWIN_NAME_OF(x) #x
#define SWIN_NAME(x) SWIN_NAME_OF(x)

namespace swin {
namespace SWIN_ISA {
namespace {

// Calls f<T>() for the arithmetic precision of a call.
template <class F>
void in_precision(ElementType type, const F& f) {
  if (type == ElementType::kFloat64)
    f(double());
  else
    f(float());
}

void partials(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) { norm_partials<decltype(t)>(call, begin, end, scratch); });
}

void statistics(const NormCall& call) {
  in_precision(call.type, [&](auto t) { norm_statistics<decltype(t)>(call); });
}

void apply(const NormCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      norm_apply<T, true, true>(call, begin, end, scratch);
    else if (call.residual != nullptr)
      norm_apply<T, true, false>(call, begin, end, scratch);
    else
      norm_apply<T, false, false>(call, begin, end, scratch);
  });
}

void backward_partials(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      norm_backward_partials<T, false, true>(call, begin, end, scratch);
    else if (call.x != nullptr)
      norm_backward_partials<T, false, false>(call, begin, end, scratch);
    else
      norm_backward_partials<T, true, false>(call, begin, end, scratch);
  });
}

void backward_means(const NormBackwardCall& call) {
  in_precision(call.type, [&](auto t) { norm_backward_means<decltype(t)>(call); });
}

void backward_apply(const NormBackwardCall& call, int64_t begin, int64_t end, void* scratch) {
  in_precision(call.type, [&](auto t) {
    using T = decltype(t);
    if (call.normalize_residual)
      norm_backward_apply<T, false, true, true>(call, begin, end, scratch);
    else if (call.grad_residual != nullptr)
      norm_backward_apply<T, false, true, false>(call, begin, end, scratch);
    else if (call.x != nullptr)
      norm_backward_apply<T, false, false, false>(call, begin, end, scratch);
    else
      norm_backward_apply<T, true, false, false>(call, begin, end, scratch);
  });
}

int64_t pack_items(const ConvolutionCall& call) { return panels_of(call) * (call.kernel == 1 ? 1 : 9); }

int64_t convolution_scratch(const ConvolutionCall& call) {
  return call.kernel == 1 ? PointwiseWorker::scratch(call) : WinogradWorker::scratch(call);
}

int64_t convolution_blocks(const ConvolutionCall& call) {
  return call.kernel == 1 ? PointwiseWorker::blocks(call) : WinogradWorker::blocks(call);
}

template <class Worker>
void convolve_with(const ConvolutionCall& call, float* scratch, WorkCounter& next) {
  Worker worker(call, scratch);
  const int64_t blocks = convolution_blocks(call);
  for (int64_t i; (i = next.fetch_add(1)) < blocks;) worker.run(i);
}

void convolve(const ConvolutionCall& call, float* scratch, WorkCounter& next) {
  if (call.kernel == 1)
    convolve_with<PointwiseWorker>(call, scratch, next);
  else
    convolve_with<WinogradWorker>(call, scratch, next);
}

int64_t weight_gradient_scratch(const WeightGradientCall& call) { return WeightGradientWorker::scratch(call); }

void add_weight_gradient(const WeightGradientCall& call, float* scratch, WorkCounter& next) {
  WeightGradientWorker worker(call, scratch);
  const int64_t items = weight_gradient_items(call);
  for (int64_t i; (i = next.fetch_add(1)) < items;) worker.run(i);
}

}  // namespace

extern const DecoderKernels decoder_kernels;
const DecoderKernels decoder_kernels = {SWIN_NAME(SWIN_ISA),
                                        partials,
                                        statistics,
                                        apply,
                                        backward_partials,
                                        backward_means,
                                        backward_apply,
                                        packed_weights,
                                        pack_items,
                                        pack_weights,
                                        convolution_scratch,
                                        convolution_blocks,
                                        convolve,
                                        weight_gradient_sums,
                                        weight_gradient_scratch,
                                        weight_gradient_items,
                                        add_weight_gradient,
                                        finish_weight_gradient};

}  // namespace SWIN_ISA
}  // namespace swin
