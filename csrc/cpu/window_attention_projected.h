// The forward of window attention with its projection inside, on vectors: qkv of a few windows stays in cache.
#pragma once

#include "projection.h"
#include "window_attention_forward.h"

namespace swin {
namespace SWIN_ISA {

// Where qkv of a group of windows stays in the second-level cache.
constexpr int64_t kMostProjectedChannels = 64;

template <int kHeadDim>
class ProjectedForwardWorker : ForwardWorker<float, kHeadDim> {
  using Base = ForwardWorker<float, kHeadDim>;
  using Base::call_, Base::group_;

 public:
  ProjectedForwardWorker(const ProjectedForwardCall& call, Arena& arena) : Base(call, arena), projection_(call, arena) {
    const int64_t part = group_.padded_tokens() * group_.channels();
    for (Parts& parts : parts_) parts = {arena.take<float>(part), arena.take<float>(part), arena.take<float>(part)};
  }

  // An item of work is a group of windows with all their heads, which lie side by side among the chunks.
  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    projection_.prepare();
    for (int64_t i; (i = next.fetch_add(call_.heads)) < count;) {
      const int windows = static_cast<int>(chunks[i].end - chunks[i].begin);
      group_.enter(chunks[i].pattern, 0);
      for (int g = 0; g < windows; ++g) {
        group_.place(g, chunks[i].begin + g);
        projection_.project(group_.window(g).token, group_.tokens(), parts_[g].queries, parts_[g].keys,
                            parts_[g].values);
      }
      for (int64_t head = 0; head < call_.heads; ++head) {
        group_.enter(chunks[i].pattern, head);
        for (int g = 0; g < windows; ++g) take(g, head);
        Base::attend_placed(windows);
      }
    }
  }

 private:
  struct Parts {
    float *queries, *keys, *values;
  };

  void take(int g, int64_t head) {
    GroupWindow<float>& window = group_.window(g);
    const int64_t part = head * group_.padded_tokens() * kHeadDim;
    window.queries = parts_[g].queries + head * kHeadDim;
    window.query_stride = group_.channels();
    window.keys = parts_[g].keys + part;
    window.values = parts_[g].values + part;
  }

  Projection projection_;
  Parts parts_[kGroup];
};

}  // namespace SWIN_ISA
}  // namespace swin
