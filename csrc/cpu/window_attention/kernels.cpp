// Compiled once per vector width with -DSWIN_ISA=<name>: the kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "cpu/window_attention/kernels.h"

#include "cpu/window_attention/backward.h"
#include "cpu/window_attention/bias.h"
#include "cpu/window_attention/forward.h"

namespace swin {
namespace SWIN_ISA {

using namespace window_attention;

namespace {

// Calls f<T, head_dim>() for the element type and head_dim of a call; head_dim 0 stands for any.
template <class F>
auto dispatch(const AttentionCall& call, const F& f) {
  if (call.type == ElementType::kFloat64) return f.template operator()<double, 0>();
  switch (call.head_dim) {
    case 4: return f.template operator()<float, 4>();
    case 8: return f.template operator()<float, 8>();
    case 16: return f.template operator()<float, 16>();
    case 32: return f.template operator()<float, 32>();
    case 64: return f.template operator()<float, 64>();
    default: return f.template operator()<float, 0>();
  }
}

template <template <class, int> class Worker, class Call>
struct Scratch {
  const Call& call;
  template <class T, int kHeadDim>
  size_t operator()() const {
    Arena arena(nullptr);
    Worker<T, kHeadDim>(call, arena);
    return arena.used();
  }
};

template <template <class, int> class Worker, class Call>
struct Run {
  const Call& call;
  const WindowChunk* chunks;
  int64_t count;
  void* scratch;
  WorkCounter& next;
  template <class T, int kHeadDim>
  void operator()() const {
    Arena arena(scratch);
    Worker<T, kHeadDim>(call, arena).run(chunks, count, next);
  }
};

}  // namespace

size_t attention_forward_scratch(const ForwardCall& call) {
  return dispatch(call, Scratch<ForwardWorker, ForwardCall>{call});
}

void attention_forward(const ForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  dispatch(call, Run<ForwardWorker, ForwardCall>{call, chunks, count, scratch, next});
}

size_t attention_backward_scratch(const BackwardCall& call) {
  return dispatch(call, Scratch<BackwardWorker, BackwardCall>{call});
}

void attention_backward(const BackwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                        WorkCounter& next) {
  dispatch(call, Run<BackwardWorker, BackwardCall>{call, chunks, count, scratch, next});
}

// One item is one head.
void prepare_bias(const AttentionCall& call, WorkCounter& next) {
  for (int64_t head; (head = next.fetch_add(1)) < call.heads;) {
    if (call.type == ElementType::kFloat64)
      fill_bias_column<double>(call, head);
    else
      fill_bias_column<float>(call, head);
  }
}

// One item is one head.
void reduce_gradients(const BackwardCall& call, const WindowChunk* chunks, int64_t count, WorkCounter& next) {
  for (int64_t head; (head = next.fetch_add(1)) < call.heads;) {
    if (call.type == ElementType::kFloat64) {
      reduce_bias<double>(call, chunks, count, head);
      reduce_padding<double>(call, chunks, count, head);
    } else {
      reduce_bias<float>(call, chunks, count, head);
      reduce_padding<float>(call, chunks, count, head);
    }
  }
}

}  // namespace SWIN_ISA
}  // namespace swin
