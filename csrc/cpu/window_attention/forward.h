#pragma once

#include "cpu/window_attention/window_group.h"

namespace swin {
namespace SWIN_ISA {
namespace window_attention {

template <class T, int kHeadDim>
class ForwardWorker {
 public:
  ForwardWorker(const ForwardCall& call, Arena& arena)
      : call_(call),
        group_(call, arena),
        query_rows_(arena.take<T>(kRows * group_.width())),
        tile_(arena.take<T>(kRows * group_.padded_tokens())),
        sums_(arena.take<T>(kRows * group_.width())) {}

  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    for (int64_t i; (i = next.fetch_add(1)) < count;) {
      group_.enter(chunks[i].pattern, chunks[i].head);
      for (int64_t begin = chunks[i].begin; begin < chunks[i].end; begin += kGroup)
        attend(begin, static_cast<int>(chunks[i].end - begin < kGroup ? chunks[i].end - begin : kGroup));
    }
  }

 protected:
  void attend(int64_t begin, int count) {
    for (int g = 0; g < count; ++g) {
      GroupWindow<T>& window = group_.window(g);
      group_.place(g, begin + g);
      group_.pack(window, 1, window.keys, nullptr);
      group_.pack(window, 2, nullptr, window.values);
    }
    attend_placed(count);
  }

  // Windows [0, count) of the group, whose tokens, keys and values are ready.
  void attend_placed(int count) {
    for (int g = 0; g < count; ++g) group_.bound(group_.window(g), group_.padded_tokens() * group_.width());
    const auto prefetch = [&](int64_t token) {
      if (call_.qkv) group_.prefetch_part(token, 0);
      group_.prefetch_row(call_.out, token * group_.channels());
      if (call_.lse) __builtin_prefetch(static_cast<T*>(call_.lse) + token * call_.heads);
    };
    group_.for_each_block(count, prefetch,
                          [&](const GroupWindow<T>& window, const Region& region, int64_t first, int64_t last) {
                            attend_block(window, region, first, last);
                          });
  }

  void attend_block(const GroupWindow<T>& window, const Region& region, int64_t first, int64_t last) {
    group_.for_each_tile(window, first, last,
                         [&](const int64_t* queries, int rows) { attend_tile(window, region, queries, rows); });
  }

  void attend_tile(const GroupWindow<T>& window, const Region& region, const int64_t* queries, int rows) {
    const int64_t stride = group_.padded_tokens(), width = group_.width(), head_dim = group_.head_dim();
    T offset[kRows] = {}, sum[kRows];
    for (int r = 0; r < kRows; ++r) group_.load_query(window, queries[r], query_rows_ + r * width);
    int64_t begin = region.begin, end = region.end;
    if (group_.one_offset_serves(window, query_rows_))
      weigh(window, region, queries, sum);
    else
      weigh_from_largest(window, region, queries, rows, &begin, &end, offset, sum);

    if (call_.dropout_p > 0)
      for (int r = 0; r < rows; ++r)
        group_.drop(window, queries[r], begin, end, tile_ + r * stride, tile_ + r * stride);
    weighted_sum(tile_, stride, window.values, width, begin, end, sums_);

    for (int r = 0; r < rows; ++r) {
      const int64_t token = window.token[queries[r]];
      store_row(sums_ + r * width, 1 / sum[r], call_.type, head_dim,
                at(call_.out, call_.type, token * group_.channels() + group_.head() * head_dim));
      if (call_.lse)
        static_cast<T*>(call_.lse)[token * call_.heads + group_.head()] =
            (offset[r] + std::log2(sum[r])) * static_cast<T>(kLn2);
    }
  }

  // Weights 2^score of a tile for the keys of its region, and their sums, as the scores are computed.
  void weigh(const GroupWindow<T>& window, const Region& region, const int64_t* queries, T* sum) {
    const int64_t stride = group_.padded_tokens();
    Vec<T> total[kRows] = {};
    T* tile = tile_;
    group_.score(query_rows_, queries, region, window.keys,
                 [&, stride, tile](int r, int64_t column, auto& x) __attribute__((always_inline)) {
                   powers_of_two<T>(x);
                   Vec<T> partial = x[0];
                   for (int c = 1; c < count_of(x); ++c) partial += x[c];
                   for (int c = 0; c < count_of(x); ++c) store(tile + r * stride + column + c * kLanes<T>, x[c]);
                   total[r] += partial;
                 });
    for (int r = 0; r < kRows; ++r) sum[r] = sum_lanes<T>(total[r]);
  }

  // Weights 2^(score - offset) of a tile with its largest score as offset; for the keys of all regions where regions
  // other than its own matter.
  void weigh_from_largest(const GroupWindow<T>& window, const Region& region, const int64_t* queries, int rows,
                          int64_t* begin, int64_t* end, T* offset, T* sum) {
    const int64_t stride = group_.padded_tokens();
    T norm[kRows];
    group_.norms(query_rows_, norm);
    Vec<T> seen[kRows];
    const auto remember = [&](int r, int64_t column, auto& x) {
      Vec<T> larger = x[0];
      for (int c = 0; c < count_of(x); ++c) {
        store(tile_ + r * stride + column + c * kLanes<T>, x[c]);
        larger = max<T>(x[c], larger);
      }
      seen[r] = max<T>(larger, seen[r]);
    };
    const auto find_largest = [&] {
      for (int r = 0; r < kRows; ++r) offset[r] = max_lanes<T>(seen[r]);
    };
    for (int r = 0; r < kRows; ++r) seen[r] = broadcast(-static_cast<T>(INFINITY));
    group_.score(query_rows_, queries, region, window.keys, remember);
    find_largest();
    if (group_.others_matter(window, norm, rows, offset)) {
      *begin = 0;
      *end = stride;
      group_.score_all(query_rows_, queries, region, window.keys, remember);
      find_largest();
    }
    for (int r = 0; r < kRows; ++r) sum[r] = exp2_row(tile_ + r * stride, offset[r], *begin, *end);
  }

  const ForwardCall& call_;
  WindowGroup<T, kHeadDim> group_;
  T* query_rows_;  // (kRows, width)
  T* tile_;        // (kRows, padded n)
  T* sums_;        // (kRows, width)
};

}  // namespace window_attention
}  // namespace SWIN_ISA
}  // namespace swin
