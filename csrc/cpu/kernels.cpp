// Compiled once per vector width with -DSWIN_ISA=<name>; offers the kernels of that build.
// No standard containers here: what the linker merges across builds must not hold their instructions.
#include "kernels.h"

#include "window_attention_backward.h"
#include "window_attention_forward.h"
#include "window_attention_projected.h"

#ifndef SWIN_ISA
#error "define SWIN_ISA to the name of this build"
#endif
#define SWIN_NAME_OF(x) #x
#define SWIN_NAME(x) SWIN_NAME_OF(x)

namespace swin {
namespace SWIN_ISA {
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

struct Scratch {
  const AttentionCall& call;
  bool backward;
  template <class T, int kHeadDim>
  size_t operator()() const {
    Arena arena(nullptr);
    if (backward)
      BackwardWorker<T, kHeadDim>(static_cast<const BackwardCall&>(call), arena);
    else
      ForwardWorker<T, kHeadDim>(static_cast<const ForwardCall&>(call), arena);
    return arena.used();
  }
};

struct Forward {
  const ForwardCall& call;
  const WindowChunk* chunks;
  int64_t count;
  void* scratch;
  WorkCounter& next;
  template <class T, int kHeadDim>
  void operator()() const {
    Arena arena(scratch);
    ForwardWorker<T, kHeadDim>(call, arena).run(chunks, count, next);
  }
};

struct Backward {
  const BackwardCall& call;
  const WindowChunk* chunks;
  int64_t count;
  void* scratch;
  WorkCounter& next;
  template <class T, int kHeadDim>
  void operator()() const {
    Arena arena(scratch);
    BackwardWorker<T, kHeadDim>(call, arena).run(chunks, count, next);
  }
};

size_t attention_scratch(const AttentionCall& call, bool backward) { return dispatch(call, Scratch{call, backward}); }

void attention_forward(const ForwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                       WorkCounter& next) {
  dispatch(call, Forward{call, chunks, count, scratch, next});
}

void attention_backward(const BackwardCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                        WorkCounter& next) {
  dispatch(call, Backward{call, chunks, count, scratch, next});
}

// A vector must not lie in two heads.
bool projects(const AttentionCall& call, bool) {
  return call.type == ElementType::kFloat32 && call.bias_type == ElementType::kFloat32 && call.dropout_p == 0 &&
         (call.head_dim == 8 || call.head_dim == 16 || call.head_dim == 32) && call.head_dim % kLanes<float> == 0 &&
         call.heads * call.head_dim <= kMostProjectedChannels && call.heads * call.head_dim % kPanel == 0;
}

template <class F>
auto dispatch_projected(const AttentionCall& call, const F& f) {
  switch (call.head_dim) {
    case 8: return f.template operator()<8>();
    case 16: return f.template operator()<16>();
    default: return f.template operator()<32>();
  }
}

template <template <int> class Worker, class ProjectedCall>
struct ProjectedScratch {
  const ProjectedCall& call;
  template <int kHeadDim>
  size_t operator()() const {
    Arena arena(nullptr);
    Worker<kHeadDim>(call, arena);
    return arena.used();
  }
};

template <template <int> class Worker, class ProjectedCall>
struct ProjectedRun {
  const ProjectedCall& call;
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

template <template <int> class Worker, class ProjectedCall>
size_t projected_scratch(const ProjectedCall& call) {
  return dispatch_projected(call, ProjectedScratch<Worker, ProjectedCall>{call});
}

template <template <int> class Worker, class ProjectedCall>
void run_projected(const ProjectedCall& call, const WindowChunk* chunks, int64_t count, void* scratch,
                   WorkCounter& next) {
  dispatch_projected(call, ProjectedRun<Worker, ProjectedCall>{call, chunks, count, scratch, next});
}

// One item is one head: its column of the bias table as window_attention.h describes it.
template <class T>
void fill_bias_column(const AttentionCall& call, int64_t head) {
  const int64_t length = bias_table_length(call.plan->grid);
  T* column = bias_column<T>(call, head);
  T largest = -static_cast<T>(INFINITY), largest_size = 0, not_finite = 0;
  for (int64_t i = 0; i < length; ++i) {
    T* entry = column + length - 1 - i;
    load_row(at(call.bias_table, call.bias_type, i * call.heads + head), call.bias_type, 1, entry);
    *entry *= static_cast<T>(kLog2E);
    largest = *entry > largest ? *entry : largest;
    largest_size = std::abs(*entry) > largest_size ? std::abs(*entry) : largest_size;
    not_finite += *entry * 0;
  }
  for (int64_t i = length; i < call.bias_stride; ++i) column[i] = 0;
  column[call.bias_stride - 2] = largest_size + not_finite;
  column[call.bias_stride - 1] = largest + not_finite;
}

void prepare_bias(const AttentionCall& call, WorkCounter& next) {
  for (int64_t head; (head = next.fetch_add(1)) < call.heads;) {
    if (call.type == ElementType::kFloat64)
      fill_bias_column<double>(call, head);
    else
      fill_bias_column<float>(call, head);
  }
}

// Partial bias gradients of a head's chunks, in their order, onto the table.
template <class T>
void reduce_bias(const BackwardCall& call, const WindowChunk* chunks, int64_t count, int64_t head) {
  const int64_t length = bias_table_length(call.plan->grid);
  T* sums = static_cast<T*>(call.bias_sums) + head * length;
  for (int64_t i = 0; i < length; ++i) sums[i] = 0;
  for (int64_t c = 0; c < count; ++c) {
    if (chunks[c].head != head) continue;
    const T* partial = static_cast<const T*>(call.bias_partials) + c * length;
    for (int64_t i = 0; i < length; ++i) sums[i] += partial[i];
  }
  for (int64_t i = 0; i < length; ++i)
    store_row(sums + i, T(1), call.bias_type, 1, at(call.grad_bias_table, call.bias_type, i * call.heads + head));
}

// The same of what padding tokens carry.
template <class T>
void reduce_padding(const BackwardCall& call, const WindowChunk* chunks, int64_t count, int64_t head) {
  const int64_t head_dim = call.head_dim;
  const T zero = 0;
  for (int64_t d = 0; d < head_dim; ++d) {
    T grad_key = 0, grad_value = 0;
    for (int64_t c = 0; c < count; ++c) {
      if (chunks[c].head != head) continue;
      const T* partial = static_cast<const T*>(call.pad_partials) + c * 2 * head_dim;
      grad_key += partial[d];
      grad_value += partial[head_dim + d];
    }
    const int64_t channel = head * head_dim + d, channels = call.heads * head_dim;
    store_row(&zero, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, channel));
    store_row(&grad_key, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, channels + channel));
    store_row(&grad_value, T(1), call.type, 1, at(call.grad_pad_qkv, call.type, 2 * channels + channel));
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

// One item is one head, and one more the projection.
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

}  // namespace

extern const KernelTable kernels;
const KernelTable kernels = {SWIN_NAME(SWIN_ISA),
                             attention_scratch,
                             prepare_bias,
                             attention_forward,
                             attention_backward,
                             reduce_gradients,
                             projects,
                             projected_scratch<ProjectedForwardWorker>,
                             run_projected<ProjectedForwardWorker>,
                             projected_scratch<ProjectedBackwardWorker>,
                             run_projected<ProjectedBackwardWorker>,
                             reduce_projected_gradients};

}  // namespace SWIN_ISA
}  // namespace swin
