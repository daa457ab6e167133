// Shifted-window attention for one head of a few windows at a time: what forward and backward share.
//
// Scores are in base 2: queries are multiplied by scale · log2(e), the bias by log2(e), so that
// softmax(scores) = 2^(scores - max) / Σ. Tokens of a window are ordered by region (window_plan.h), and a
// query first meets only the keys of its own region. The others' scores are lowered by 100; by
// Cauchy-Schwarz they are at most |q| · max|k| + max bias - 100. Where that lies 64 powers of two below
// the query's largest score they cannot change a bit of the result and are not computed; elsewhere (or
// where anything is not finite) the whole row is.
#pragma once

#include <cmath>

#include "cpu/arena.h"
#include "cpu/storage.h"
#include "cpu/tiles.h"
#include "cpu/window_attention/kernels.h"

namespace swin {
namespace SWIN_ISA {
namespace window_attention {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kNegligible = -64;  // powers of two

// One head of the bias table in base 2 and reversed: entry (query, key) lies at
// origin - raster(query) + raster(key), so that a run of keys is read forwards. It is followed by one
// vector that copies may touch, and by the head's largest entry (NaN if any is).
template <class T>
T* bias_column(const AttentionCall& call, int64_t head) {
  return static_cast<T*>(call.bias_columns) + head * call.bias_stride;
}

// One region of a pattern: its tokens, and the whole vectors of columns that hold them.
struct Region {
  int64_t index, first, last, begin, end;
};

template <class T>
SWIN_ALWAYS_INLINE Region region_of(const WindowPattern& pattern, int64_t index) {
  const int64_t first = pattern.region_begin[index], last = pattern.region_begin[index + 1];
  return {index, first, last, first / kLanes<T> * kLanes<T>, round_up(last, kLanes<T>)};
}

// Up to kGroup windows of one pattern and head: where their tokens lie and what they hold. The bias of a
// block of queries is the same in all of them, so it is looked up once and stays in cache.
constexpr int kGroup = 4;
constexpr int64_t kBlock = 48;  // queries

// A window of the group, with the keys (and, as the worker needs, the values) of its tokens.
template <class T>
struct GroupWindow {
  int64_t index;               // over the batch
  int64_t* token;              // (n) natural index over the batch, -1 for padding
  T* keys;                     // panels
  T* values;                   // the worker's layout
  const T* queries = nullptr;  // (n, query_stride), or null: they are read from the call's qkv
  int64_t query_stride = 0;
  T max_key_norm, max_value;  // as bound() says
};

template <class T, int kHeadDim>
class WindowGroup {
 public:
  WindowGroup(const AttentionCall& call, Arena& arena)
      : call_(call),
        tokens_(call.plan->tokens),
        padded_tokens_(call.plan->padded_tokens),
        origin_(bias_origin(call.plan->grid)),
        query_factor_(static_cast<T>(call.scale * kLog2E)),
        bias_(arena.take<T>(kBlock * padded_tokens_ + kTileSlack)),
        whole_bias_(arena.take<T>(kRows * padded_tokens_ + kTileSlack)),
        stage_(arena.take<T>(kPanel * head_dim())),
        zero_(arena.take<T>(head_dim())) {
    for (int axis = 0; axis < kAxes; ++axis) axis_token_[axis] = arena.take<int64_t>(call.plan->grid.window[axis]);
    for (GroupWindow<T>& w : windows_) {
      w.token = arena.take<int64_t>(tokens_);
      w.keys = arena.take<T>(head_dim() * padded_tokens_);
      w.values = arena.take<T>(width() * padded_tokens_);
    }
  }

  int64_t head_dim() const { return kHeadDim ? kHeadDim : call_.head_dim; }
  int64_t width() const { return round_up(head_dim(), kLanes<T>); }  // head_dim in whole vectors
  int64_t channels() const { return call_.heads * head_dim(); }      // C
  int64_t tokens() const { return tokens_; }
  int64_t padded_tokens() const { return padded_tokens_; }
  int64_t head() const { return head_; }
  const WindowPattern& pattern() const { return *pattern_; }
  GroupWindow<T>& window(int g) { return windows_[g]; }
  const GroupWindow<T>& window(int g) const { return windows_[g]; }

  void enter(int64_t pattern, int64_t head) {
    pattern_ = &call_.patterns[pattern];
    head_ = head;
    column_ = bias_column<T>(call_, head);
    for (int64_t d = 0; d < head_dim(); ++d) zero_[d] = 0;
  }

  // Window g becomes number `i` of batch × windows of the pattern.
  void place(int g, int64_t i) {
    windows_[g].index = index_of(*pattern_, i);
    locate(*pattern_, i, windows_[g].token);
  }

  // The tokens (n) of number `i` of batch × windows of a pattern.
  void locate(const WindowPattern& pattern, int64_t i, int64_t* tokens) {
    const WindowGrid& grid = call_.plan->grid;
    int64_t index[kAxes];
    decode(call_.windows[pattern.window_begin + i / call_.batch], grid.counts, index);
    int64_t stride = 1;
    for (int axis = kAxes - 1; axis >= 0; --axis) {
      for (int64_t local = 0; local < grid.window[axis]; ++local) {
        const int64_t position = natural_position(grid, axis, index[axis], local);
        axis_token_[axis][local] = position < 0 ? kNowhere : position * stride;
      }
      stride *= grid.spatial[axis];
    }
    for (int64_t t = 0; t < tokens_; ++t) {
      int64_t token = i % call_.batch * stride;
      for (int axis = 0; axis < kAxes; ++axis) token += axis_token_[axis][pattern.local[axis][t]];
      tokens[t] = token < 0 ? -1 : token;
    }
  }

  // `part` (0 q, 1 k, 2 v) of a token. May be overwritten by the next call with the same `stage`.
  const T* part_row(int64_t token, int part, T* stage) const {
    const int64_t channel = part * channels() + head_ * head_dim();
    if (token >= 0) return row_of(call_.qkv, token * 3 * channels() + channel, stage);
    return call_.pad_qkv ? row_of(call_.pad_qkv, channel, stage) : zero_;
  }

  // Rows of a window lie far apart in memory: asking for many of them at once hides most of the wait.
  void prefetch_part(int64_t token, int part) const {
    if (token >= 0) prefetch_row(call_.qkv, (token * 3 + part) * channels());
  }

  // This head's part of a token's row, `channel` elements into a volume of the call's type.
  void prefetch_row(const void* volume, int64_t channel) const {
    __builtin_prefetch(at(volume, call_.type, channel + head_ * head_dim()));
  }

  // head_dim elements of an array of the call's type, in arithmetic precision.
  const T* row_of(const void* array, int64_t index, T* stage) const {
    const void* from = at(array, call_.type, index);
    if (stored_as_computed()) return static_cast<const T*>(from);
    load_row(from, call_.type, head_dim(), stage);
    return stage;
  }

  // `part` of all tokens of a window, as panels and as rows (padded n, width), as far as they are given.
  // Padding is zero.
  void pack(const GroupWindow<T>& window, int part, T* panels, T* rows) {
    for (int64_t i = 0; i < tokens_; ++i) prefetch_part(window.token[i], part);
    for (int64_t first = 0; first < padded_tokens_; first += kPanel) {
      const T* token_rows[kPanel];
      for (int64_t i = 0; i < kPanel; ++i)
        token_rows[i] = first + i < tokens_ ? part_row(window.token[first + i], part, stage_ + i * head_dim()) : zero_;
      if (rows)
        for (int64_t i = 0; i < kPanel; ++i) copy_padded(token_rows[i], rows + (first + i) * width());
      if (panels) transpose_to_panel(token_rows, head_dim(), panels + first * head_dim());
    }
  }

  // head_dim elements as whole vectors: where they lie, or copied to `stage` with a zero tail.
  const T* whole_vectors(const T* from, T* stage) const {
    if (head_dim() == width()) return from;
    copy_padded(from, stage);
    return stage;
  }

  // head_dim elements as a row of `width` with a zero tail.
  void copy_padded(const T* from, T* row) const {
    for (int64_t d = 0; d < head_dim(); ++d) row[d] = from[d];
    for (int64_t d = head_dim(); d < width(); ++d) row[d] = 0;
  }

  // Query number `query` of a window as a row of `width`, times scale · log2(e).
  void load_query(const GroupWindow<T>& window, int64_t query, T* row) const {
    const T* from = whole_vectors(
        window.queries ? window.queries + query * window.query_stride
                       : row_of(call_.qkv, window.token[query] * 3 * channels() + head_ * head_dim(), row),
        row);
    const Vec<T> factor = broadcast(query_factor_);
    for (int64_t d = 0; d < width(); d += kLanes<T>) store(row + d, load(from + d) * factor);
  }

  // By how much the scores of tokens of different regions are lowered.
  static T mask() { return static_cast<T>(kMaskValue * kLog2E); }

  // The largest magnitude of the bias; NaN if any entry is not finite.
  T largest_bias() const { return column_[call_.bias_stride - 2]; }

  // The largest norm of a key and the largest magnitude of the first `value_count` values of a window; NaN where a key
  // or value is not finite.
  void bound(GroupWindow<T>& window, int64_t value_count) const {
    Vec<T> largest = {}, total = {}, value = {};
    for (int64_t k = 0; k < padded_tokens_; k += kPanel)
      for (int64_t lane = 0; lane < kPanel; lane += kLanes<T>) {
        Vec<T> squares = {};
        for (int64_t d = 0; d < head_dim(); ++d) {
          const Vec<T> x = load(window.keys + k * head_dim() + d * kPanel + lane);
          squares += x * x;
        }
        largest = max<T>(squares, largest);
        total += squares;
      }
    for (int64_t i = 0; i < value_count; i += kLanes<T>) {
      const Vec<T> x = load(window.values + i);
      value = max<T>(max<T>(x, -x), value);
      total += x * 0;
    }
    const T not_finite = sum_lanes<T>(total) * 0;  // NaN where any key or value is not finite
    window.max_key_norm = std::sqrt(max_lanes<T>(largest)) + not_finite;
    window.max_value = max_lanes<T>(value) + not_finite;
  }

  // The norms of a tile of queries.
  void norms(const T* query_rows, T* norm) const {
    for (int r = 0; r < kRows; ++r) {
      Vec<T> square = {};
      for (int64_t d = 0; d < width(); d += kLanes<T>) {
        const Vec<T> x = load(query_rows + r * width() + d);
        square += x * x;
      }
      norm[r] = std::sqrt(sum_lanes<T>(square));
    }
  }

  // Whether scores of a tile of queries are so small that 2^score and sums of them stay inside the range of numbers,
  // with one offset for all, and that keys of other regions do not matter. False where anything is not finite.
  bool one_offset_serves(const GroupWindow<T>& window, const T* query_rows) const {
    // All rows as one vector: no shorter than the longest of them, and mostly good enough.
    Vec<T> square = {};
    for (int64_t i = 0; i < kRows * width(); i += kLanes<T>) {
      const Vec<T> x = load(query_rows + i);
      square += x * x;
    }
    if (scores_stay_small(window, std::sqrt(sum_lanes<T>(square)))) return true;
    T norm[kRows], largest = 0;
    norms(query_rows, norm);
    for (int r = 0; r < kRows; ++r) largest = norm[r] <= largest ? largest : norm[r];  // in this order a NaN stays
    return scores_stay_small(window, largest);
  }

  // Whether keys of other regions may matter to any of `rows` queries of these norms whose scores reach `score`.
  bool others_matter(const GroupWindow<T>& window, const T* norm, int rows, const T* score) const {
    if (pattern_->region_count == 1) return false;
    const T bias_and_mask = column_[call_.bias_stride - 1] + mask();
    bool matter = false;
    for (int r = 0; r < rows; ++r) {
      const T bound = norm[r] * window.max_key_norm + bias_and_mask - score[r];
      matter |= !(bound < static_cast<T>(kNegligible));
    }
    return matter;
  }

  // Looks up the bias of queries [first, last) of a region, at most kBlock, for the keys of that region.
  // Columns of its vectors that belong to no token of the region are -inf.
  void look_up_bias(const Region& own, int64_t first, int64_t last) {
    constexpr int kTogether = 4;
    block_first_ = first;
    const int64_t run = pattern_->run_begin[own.index], end = pattern_->run_begin[own.index + 1];
    int64_t q = first;
    for (; q + kTogether <= last; q += kTogether)
      copy_runs<kTogether>(q, run, end, bias_ + (q - first) * padded_tokens_);
    for (; q < last; ++q) copy_runs<1>(q, run, end, bias_ + (q - first) * padded_tokens_);
    for (q = first; q < last; ++q) {
      T* row = bias_ + (q - first) * padded_tokens_;
      for (int64_t k = own.begin; k < own.first; ++k) row[k] = kNothing;
      for (int64_t k = own.last; k < own.end; ++k) row[k] = kNothing;
    }
  }

  // The looked-up bias of `query` of the block.
  const T* bias_row(int64_t query) const { return bias_ + (query - block_first_) * padded_tokens_; }

  // Scores of a tile of query rows (kRows, width) of the block, in base 2, for the keys of their region.
  // finish(row, column, scores) takes the vectors from that column on.
  template <class Finish>
  void score(const T* query_rows, const int64_t* queries, const Region& own, const T* keys,
             const Finish& finish) const {
    const T* bias[kRows];
    for (int r = 0; r < kRows; ++r) bias[r] = bias_row(queries[r]);
    score_columns(query_rows, bias, own.begin, own.end, keys, finish);
  }

  // The same for the keys of all regions.
  template <class Finish>
  void score_all(const T* query_rows, const int64_t* queries, const Region& own, const T* keys, const Finish& finish) {
    const T* bias[kRows];
    for (int r = 0; r < kRows; ++r) {
      T* row = whole_bias_ + r * padded_tokens_;
      copy_runs<1>(queries[r], 0, pattern_->run_begin[pattern_->region_count], row);
      for (int64_t k = 0; k < tokens_; ++k)
        if (k < own.first || k >= own.last) row[k] += mask();
      for (int64_t k = tokens_; k < padded_tokens_; ++k) row[k] = kNothing;
      bias[r] = row;
    }
    score_columns(query_rows, bias, 0, padded_tokens_, keys, finish);
  }

  // Multiply columns [begin, end) of a row of weights by 0 or 1 / (1 - dropout_p).
  void drop(const GroupWindow<T>& window, int64_t query, int64_t begin, int64_t end, const T* from, T* to) const {
    const int64_t row = (window.index * call_.heads + head_) * tokens_ + pattern_->raster[query];
    const uint32_t hash = dropout_row_hash(call_.seed, row), threshold = dropout_threshold(call_.dropout_p);
    const T kept = static_cast<T>(1 / (1 - call_.dropout_p));
    const int64_t real_end = end < tokens_ ? end : tokens_;
    for (int64_t k = begin; k < real_end; ++k)
      to[k] = dropout_keep(hash, static_cast<uint32_t>(pattern_->raster[k]), threshold) ? from[k] * kept : T(0);
    for (int64_t k = real_end; k < end; ++k) to[k] = 0;
  }

  // Visits windows [0, count) of the group, one block of queries at a time: visit(window, region, first, last), with
  // the bias of queries [first, last) looked up. One window or one block ahead of a block, prefetch(token) is called
  // for its queries.
  template <class Prefetch, class Visit>
  void for_each_block(int count, const Prefetch& prefetch, const Visit& visit) {
    for (int64_t i = 0; i < pattern_->region_count; ++i) {
      const Region region = region_of<T>(*pattern_, i);
      for (int64_t first = region.first; first < region.last; first += kBlock) {
        const int64_t last = first + kBlock < region.last ? first + kBlock : region.last;
        look_up_bias(region, first, last);
        for (int g = 0; g < count; ++g) {
          const int ahead = g + 1 < count ? g + 1 : 0;
          const int64_t offset = g + 1 < count ? 0 : kBlock;
          for (int64_t q = first + offset; q < last + offset && q < tokens_; ++q)
            if (windows_[ahead].token[q] >= 0) prefetch(windows_[ahead].token[q]);
          visit(windows_[g], region, first, last);
        }
      }
    }
  }

  // Visits the queries [first, last) of a block in tiles: visit(queries, rows) for up to kRows real ones; missing ones
  // repeat the first.
  template <class Visit>
  static void for_each_tile(const GroupWindow<T>& window, int64_t first, int64_t last, const Visit& visit) {
    int64_t queries[kRows];
    int rows = 0;
    for (int64_t q = first; q < last; ++q) {
      if (window.token[q] >= 0) queries[rows++] = q;
      if (rows == 0 || (rows < kRows && q + 1 < last)) continue;
      for (int r = rows; r < kRows; ++r) queries[r] = queries[0];
      visit(queries, rows);
      rows = 0;
    }
  }

 private:
  // What one_offset_serves() says of queries of norms up to `norm`.
  bool scores_stay_small(const GroupWindow<T>& window, T norm) const {
    constexpr T kLargestScore = 60, kLargestValue = T(1ull << 48);
    const T spread = norm * window.max_key_norm + largest_bias();
    return spread < kLargestScore && window.max_value < kLargestValue &&
           (pattern_->region_count == 1 || 2 * spread + mask() < static_cast<T>(kNegligible));
  }

  int64_t index_of(const WindowPattern& pattern, int64_t i) const {
    return i % call_.batch * product(call_.plan->grid.counts) + call_.windows[pattern.window_begin + i / call_.batch];
  }

  static constexpr int64_t kNowhere = INT64_MIN / 4;  // stays negative whatever other axes add
  static constexpr int64_t kTileSlack = 16;           // a copied run may reach one vector beyond the last row
  static constexpr T kNothing = -static_cast<T>(INFINITY);

  bool stored_as_computed() const {
    return call_.type == (sizeof(T) == 8 ? ElementType::kFloat64 : ElementType::kFloat32);
  }

  // Bias of queries [query, query + kCount) for the keys of runs [first, last), a row each. A run, as long as the
  // window's last axis, is copied in short vectors: what is written beyond it is overwritten by the next run or by the
  // caller, and stays inside the row.
  template <int kCount>
  void copy_runs(int64_t query, int64_t first, int64_t last, T* rows) const {
    const T* columns[kCount];
    for (int i = 0; i < kCount; ++i) columns[i] = column_ + origin_ - pattern_->bias_raster[query + i];
    const int32_t* begin = pattern_->run_token;
    constexpr int64_t kShort = kLanes<T> < 8 ? kLanes<T> : 8;
    for (int64_t run = first; run < last; ++run) {
      const int64_t from = pattern_->bias_raster[begin[run]] - begin[run];
      int64_t k = begin[run];
      for (; k < begin[run + 1] && k + kShort <= padded_tokens_; k += kShort)
        for (int i = 0; i < kCount; ++i)
          std::memcpy(rows + i * padded_tokens_ + k, columns[i] + from + k, kShort * sizeof(T));
      for (; k < begin[run + 1]; ++k)
        for (int i = 0; i < kCount; ++i) rows[i * padded_tokens_ + k] = columns[i][from + k];
    }
  }

  template <class Finish>
  void score_columns(const T* query_rows, const T* const* bias_rows, int64_t begin, int64_t end, const T* keys,
                     const Finish& finish) const {
    const auto bias = [&](int r, int64_t column) { return load(bias_rows[r] + column); };
    product_rows<kHeadDim>(query_rows, width(), keys, head_dim(), begin, end, bias, finish);
  }

  const AttentionCall& call_;
  const int64_t tokens_, padded_tokens_, origin_;
  const T query_factor_;
  T *bias_, *whole_bias_;  // (kBlock, padded n), (kRows, padded n)
  T *stage_, *zero_;
  int64_t* axis_token_[kAxes];
  GroupWindow<T> windows_[kGroup];
  const WindowPattern* pattern_ = nullptr;
  const T* column_ = nullptr;
  int64_t head_ = 0, block_first_ = 0;
};

}  // namespace window_attention
}  // namespace SWIN_ISA
}  // namespace swin
