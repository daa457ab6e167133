#pragma once

#include "window_attention.h"

namespace swin {
namespace SWIN_ISA {

template <class T, int kHeadDim>
class ForwardWorker {
 public:
  ForwardWorker(const ForwardCall& call, Arena& arena)
      : call_(call),
        head_(call, arena),
        keys_(arena.take<T>(head_.head_dim() * head_.padded_tokens())),
        values_(arena.take<T>(head_.padded_tokens() * head_.width())),
        query_rows_(arena.take<T>(kRows * head_.width())),
        queries_(arena.take<T>(kRows * head_.head_dim())),
        tile_(arena.take<T>(kRows * head_.padded_tokens())),
        bias_(arena.take<T>(kRows * head_.padded_tokens())),
        sums_(arena.take<T>(kRows * head_.width())) {}

  void run(WorkCounter& next) {
    const int64_t windows = product(call_.plan->grid.counts);
    const int64_t items = windows * call_.batch * call_.heads;
    for (int64_t item; (item = next.fetch_add(1)) < items;) {
      const int64_t head = item % call_.heads, place = item / call_.heads / call_.batch;
      int64_t pattern = 0;
      while (place >= call_.patterns[pattern].window_end) ++pattern;
      attend(pattern, call_.windows[place], item / call_.heads % call_.batch, head);
    }
  }

 private:
  void attend(int64_t pattern, int64_t window, int64_t batch, int64_t head) {
    head_.enter(pattern, window, batch, head);
    head_.pack(1, keys_, nullptr);
    head_.pack(2, nullptr, values_);
    const int64_t regions = head_.pattern().region_count;
    if (regions > 1) head_.bound_other_regions(keys_, values_);
    for (int64_t i = 0; i < regions; ++i) {
      const Region region = region_of<T>(head_.pattern(), i);
      head_.for_each_tile(region, [&](const int64_t* queries, int count) { attend_tile(region, queries, count, head); });
    }
  }

  void attend_tile(const Region& region, const int64_t* queries, int count, int64_t head) {
    const int64_t stride = head_.padded_tokens(), width = head_.width(), head_dim = head_.head_dim();
    const T factor = static_cast<T>(call_.scale * kLog2E);
    T squares[kRows] = {};
    for (int r = 0; r < count; ++r) {
      T* row = query_rows_ + r * width;
      head_.load_part(queries[r], 0, row);
      for (int64_t d = 0; d < head_dim; ++d) {
        row[d] *= factor;
        squares[r] += row[d] * row[d];
      }
    }
    transpose_rows(query_rows_, width, count, head_dim, queries_);

    const T* bias_rows[kRows];
    const T label = static_cast<T>(head_.pattern().label[region.first]);
    int64_t begin = region.begin, end = region.end;
    T largest[kRows];
    head_.own_bias_rows(queries, bias_rows);
    head_.score(queries_, keys_, bias_rows, label, begin, end, tile_);
    find_largest(begin, end, largest);
    if (head_.pattern().region_count > 1 && others_matter(squares, largest, count)) {
      begin = 0;
      end = stride;
      head_.whole_bias_rows(queries, bias_, bias_rows);
      head_.score(queries_, keys_, bias_rows, label, begin, end, tile_);
      find_largest(begin, end, largest);
    }

    T sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = exp2_row(tile_ + r * stride, largest[r], begin, end);
    if (call_.dropout_p > 0)
      for (int r = 0; r < count; ++r) head_.drop(queries[r], begin, end, tile_ + r * stride, tile_ + r * stride);
    weighted_sum(tile_, stride, values_, width, begin, end, sums_);

    for (int r = 0; r < count; ++r) {
      const int64_t token = head_.token(queries[r]);
      store_row(sums_ + r * width, 1 / sum[r], call_.type, head_dim,
                at(call_.out, call_.type, token * head_.channels() + head * head_dim));
      static_cast<T*>(call_.lse)[token * call_.heads + head] =
          (largest[r] + std::log2(sum[r])) * static_cast<T>(kLn2);
    }
  }

  void find_largest(int64_t begin, int64_t end, T* largest) const {
    for (int r = 0; r < kRows; ++r) {
      const T* row = tile_ + r * head_.padded_tokens();
      Vec<T> m = load(row + begin);
      for (int64_t k = begin + kLanes<T>; k < end; k += kLanes<T>) m = max<T>(m, load(row + k));
      largest[r] = max_lanes<T>(m);
    }
  }

  bool others_matter(const T* squares, const T* largest, int count) const {
    bool matter = false;
    for (int r = 0; r < count; ++r) matter |= head_.others_matter(squares[r], largest[r]);
    return matter;
  }

  const ForwardCall& call_;
  WindowHead<T, kHeadDim> head_;
  T *keys_, *values_;         // (head_dim, padded n), (padded n, width)
  T *query_rows_, *queries_;  // (kRows, width), (head_dim, kRows)
  T *tile_, *bias_;           // (kRows, padded n)
  T* sums_;                   // (kRows, width)
};

}  // namespace SWIN_ISA
}  // namespace swin
