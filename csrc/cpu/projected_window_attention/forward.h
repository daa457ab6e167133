// Window attention with its projections inside, on vectors: qkv of a few windows stays in cache.
#pragma once

#include "cpu/projected_window_attention/output_projection.h"
#include "cpu/projected_window_attention/projection.h"
#include "cpu/window_attention/forward.h"

namespace swin {
namespace SWIN_ISA {
namespace projected_window_attention {

using namespace window_attention;

template <int kHeadDim>
class ProjectedForwardWorker : ForwardWorker<float, kHeadDim> {
  using Base = ForwardWorker<float, kHeadDim>;
  using Base::group_;

 public:
  ProjectedForwardWorker(const ProjectedForwardCall& call, Arena& arena)
      : Base(call, arena),
        heads_(call.heads),
        projection_(call, call, arena),
        output_(call, arena),
        rows_(arena.take<float>(Projection::padded_rows(group_.padded_tokens()) * group_.channels())) {
    const int64_t part = group_.padded_tokens() * group_.channels();
    for (Parts& parts : parts_) parts = {arena.take<float>(part), arena.take<float>(part), arena.take<float>(part)};
  }

  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    projection_.prepare();
    output_.prepare();
    for (int64_t i; (i = next.fetch_add(heads_)) < count;) {
      const int windows = static_cast<int>(chunks[i].end - chunks[i].begin);
      group_.enter(chunks[i].pattern, 0);
      for (int g = 0; g < windows; ++g) {
        group_.place(g, chunks[i].begin + g);
        projection_.normalize(group_.window(g).token, group_.tokens(), rows_);
        projection_.project(0, rows_, parts_[g].queries);
        projection_.project_keys(rows_, parts_[g].keys);
        projection_.project_by_head(2, rows_, parts_[g].values);
      }
      for (int64_t head = 0; head < heads_; ++head) {
        group_.enter(chunks[i].pattern, head);
        for (int g = 0; g < windows; ++g) take(g, head);
        Base::attend_placed(windows);
      }
      for (int g = 0; g < windows; ++g) output_.project(group_.window(g).token, group_.tokens());
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

  const int64_t heads_;
  Projection projection_;
  OutputProjection output_;
  float* rows_;  // normalised, of one window
  Parts parts_[kGroup];
};

}  // namespace projected_window_attention
}  // namespace SWIN_ISA
}  // namespace swin
