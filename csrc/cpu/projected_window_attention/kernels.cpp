// Compiled once per vector width with -DSWIN_ISA=<name>: the kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "cpu/projected_window_attention/kernels.h"

#include "cpu/projected_window_attention/backward.h"
#include "cpu/projected_window_attention/forward.h"
#include "cpu/window_attention/bias.h"

namespace swin {
namespace SWIN_ISA {

using namespace projected_window_attention;
using namespace window_attention;

namespace {

// A vector must not span two heads.
bool projects(const AttentionCall& call) {
  return call.type == ElementType::kFloat32 && call.bias_type == ElementType::kFloat32 && call.dropout_p == 0 &&
         (call.head_dim == 8 || call.head_dim == 16 || call.head_dim == 32) && call.head_dim % kLanes<float> == 0 &&
         call.heads * call.head_dim <= kMostProjectedChannels && call.heads * call.head_dim % kPanel == 0;
}

template <class F>
auto dispatch(const AttentionCall& call, const F& f) {
  switch (call.head_dim) {
    case 8: return f.template operator()<8>();
    case 16: return f.template operator()<16>();
    default: return f.template operator()<32>();
  }
}

template <template <int> class Worker, class Call>
struct Scratch {
  const Call& call;
  template <int kHeadDim>
  size_t operator()() const {
    Arena arena(nullptr);
    Worker<kHeadDim>(call, arena);
    return arena.used();
  }
};

template <template <int> class Worker, class Call>
struct Run {
  const Call& call;
  const WindowChunk* chunks;
  int64_t count;
  void* scratch;
  WorkCounter& next;
  template <int kHeadDim>
  void operator()() const {
    Arena arena(scratch);
    Worker<kHeadDim>(call, arena).run(chunks, count, next);
  }
};

}  // namespace

bool projects_forward(const AttentionCall& call) { return projects(call); }

bool projects_backward(const AttentionCall& call) { return projects(call); }

size_t projected_forward_scratch(const ProjectedForwardCall& call) {
  return dispatch(call, Scratch<ProjectedForwardWorker, ProjectedForwardCall>{call});
}

void projected_forward(const ProjectedForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  dispatch(call, Run<ProjectedForwardWorker, ProjectedForwardCall>{call, chunks, count, scratch, next});
}

size_t projected_backward_scratch(const ProjectedBackwardCall& call) {
  return dispatch(call, Scratch<ProjectedBackwardWorker, ProjectedBackwardCall>{call});
}

void projected_backward(const ProjectedBackwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                        WorkCounter& next) {
  dispatch(call, Run<ProjectedBackwardWorker, ProjectedBackwardCall>{call, chunks, count, scratch, next});
}

// One item for each head, and one more for the projection.
void reduce_projected_gradients(const ProjectedBackwardCall& call, const WindowChunk* chunks, int64_t count,
                                WorkCounter& next) {
  for (int64_t head; (head = next.fetch_add(1)) <= call.heads;) {
    if (head < call.heads) {
      reduce_bias<float>(call, chunks, count, head);
      continue;
    }
    const int64_t parameters = projection_parameters(call.heads * call.head_dim);
    for (int64_t i = 0; i < parameters; ++i) call.grad_projection[i] = 0;
    for (int64_t item = 0; item < count / call.heads; ++item)
      for (int64_t i = 0; i < parameters; ++i)
        call.grad_projection[i] += call.projection_partials[item * parameters + i];
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
