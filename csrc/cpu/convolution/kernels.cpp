// Compiled once per vector width with -DSWIN_ISA=<name>: the kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "cpu/convolution/kernels.h"

#include "cpu/convolution/forward.h"
#include "cpu/convolution/weight_gradient.h"

namespace swin {
namespace SWIN_ISA {

using namespace convolution;

namespace {

template <class Worker>
void convolve_with(const ConvolutionCall& call, float* scratch, WorkCounter& next) {
  Worker worker(call, scratch);
  const int64_t blocks = Worker::blocks(call);
  for (int64_t i; (i = next.fetch_add(1)) < blocks;) worker.run(i);
}

}  // namespace

int64_t packed_weights(const ConvolutionCall& call) {
  const int64_t vectors = (call.out_channels + kLanes<float> - 1) / kLanes<float>;
  return (call.kernel == 1 ? 1 : 9 * kFrequencies) * in_channels(call) * vectors * kLanes<float>;
}

int64_t pack_items(const ConvolutionCall& call) { return panels_of(call) * (call.kernel == 1 ? 1 : 9); }

void pack_weights(const ConvolutionCall& call, int64_t item) { pack_panel(call, item); }

int64_t convolution_scratch(const ConvolutionCall& call) {
  return call.kernel == 1 ? PointwiseWorker::scratch(call) : WinogradWorker::scratch(call);
}

int64_t convolution_blocks(const ConvolutionCall& call) {
  return call.kernel == 1 ? PointwiseWorker::blocks(call) : WinogradWorker::blocks(call);
}

void convolve(const ConvolutionCall& call, float* scratch, WorkCounter& next) {
  if (call.kernel == 1)
    convolve_with<PointwiseWorker>(call, scratch, next);
  else
    convolve_with<WinogradWorker>(call, scratch, next);
}

int64_t weight_gradient_sums(const WeightGradientCall& call) { return slab_sums(call); }

int64_t weight_gradient_scratch(const WeightGradientCall& call) { return WeightGradientWorker::scratch(call); }

int64_t weight_gradient_items(const WeightGradientCall& call) { return WeightGradientWorker::items(call); }

void add_weight_gradient(const WeightGradientCall& call, float* scratch, WorkCounter& next) {
  WeightGradientWorker worker(call, scratch);
  const int64_t items = WeightGradientWorker::items(call);
  for (int64_t i; (i = next.fetch_add(1)) < items;) worker.run(i);
}

void finish_weight_gradient(const WeightGradientCall& call, int64_t in_channel) { join_slabs(call, in_channel); }

}  // namespace SWIN_ISA
}  // namespace swin
