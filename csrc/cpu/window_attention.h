// Shifted-window attention for one (window, head) at a time: what forward and backward share.
//
// Scores live in base 2: queries carry scale · log2(e), the bias carries log2(e), so that
// softmax(scores) = 2^(scores - max) / Σ. Tokens of a window are ordered by region (window_plan.h), and a
// query first meets the keys of its own region only. The others' scores are lowered by 100; by
// Cauchy-Schwarz they are at most |q| · max|k| + max bias - 100. Where that lies 64 powers of two below
// the query's largest score they cannot change a bit of the result and are not computed; elsewhere (or
// where anything is not finite) the whole row is.
#pragma once

#include <cmath>

#include "kernels.h"
#include "storage.h"
#include "tiles.h"

namespace swin {
namespace SWIN_ISA {

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kNegligible = -64;  // powers of two

SWIN_ALWAYS_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Hands out consecutive pieces of one allocation, each on a cache line of its own. A base of 0 measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)), next_(base_) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
  size_t used() const { return next_ - base_; }

 private:
  uintptr_t base_, next_;
};

// The bias table by head in base 2; the entry after the last is the head's largest (NaN if any is).
template <class T>
const T* bias_column(const AttentionCall& call, int64_t head) {
  return static_cast<const T*>(call.bias_columns) + head * (bias_table_length(call.plan->grid) + 1);
}

template <class T>
T* bias_tile(const AttentionCall& call, int64_t pattern, int64_t head) {
  const int64_t tile = call.plan->tokens * call.plan->padded_tokens;
  return static_cast<T*>(call.bias_tiles) + (pattern * call.heads + head) * tile;
}

// Columns [begin, end) of the bias row of `query`; -inf beyond the window's tokens.
template <class T>
SWIN_ALWAYS_INLINE void fill_bias_row(const AttentionCall& call, const WindowPattern& pattern, const T* column,
                                      int64_t query, int64_t begin, int64_t end, T* row) {
  const T* entry = column + pattern.bias_raster[query] + bias_origin(call.plan->grid);
  const int64_t real_end = end < call.plan->tokens ? end : call.plan->tokens;
  for (int64_t k = begin; k < real_end; ++k) row[k] = entry[-pattern.bias_raster[k]];
  for (int64_t k = real_end; k < end; ++k) row[k] = -static_cast<T>(INFINITY);
}

// One region of a pattern: its tokens, and the whole vectors of columns that hold them.
struct Region {
  int64_t first, last, begin, end;
};

template <class T>
SWIN_ALWAYS_INLINE Region region_of(const WindowPattern& pattern, int64_t index) {
  const int64_t first = pattern.region_begin[index], last = pattern.region_begin[index + 1];
  return {first, last, first / kLanes<T> * kLanes<T>, round_up(last, kLanes<T>)};
}

// Keys and values of one (window, head), and where its tokens lie.
template <class T, int kHeadDim>
class WindowHead {
 public:
  WindowHead(const AttentionCall& call, Arena& arena)
      : call_(call),
        tokens_(call.plan->tokens),
        padded_tokens_(call.plan->padded_tokens),
        width_(round_up(head_dim(), kLanes<T>)),
        token_(arena.take<int64_t>(tokens_)),
        label_(arena.take<T>(padded_tokens_)),
        stage_(arena.take<T>(kTokenAlignment * head_dim())) {}

  int64_t head_dim() const { return kHeadDim ? kHeadDim : call_.head_dim; }
  int64_t tokens() const { return tokens_; }
  int64_t padded_tokens() const { return padded_tokens_; }
  int64_t width() const { return width_; }                      // head_dim in whole vectors
  int64_t channels() const { return call_.heads * head_dim(); } // C
  int64_t token(int64_t i) const { return token_[i]; }          // natural index over the batch, -1 for padding
  const T* labels() const { return label_; }

  void enter(int64_t pattern, int64_t window, int64_t batch, int64_t head) {
    pattern_ = &call_.patterns[pattern];
    head_ = head;
    batch_window_ = batch * product(call_.plan->grid.counts) + window;
    locate(window, batch);
    if (pattern_->region_count > 1)
      for (int64_t i = 0; i < padded_tokens_; ++i) label_[i] = static_cast<T>(pattern_->label[i]);
  }

  const WindowPattern& pattern() const { return *pattern_; }

  // Row of `part` (0 q, 1 k, 2 v) of token i.
  void load_part(int64_t i, int part, T* row) const {
    const int64_t at_channel = part * channels() + head_ * head_dim();
    if (token_[i] >= 0)
      load_row(at(call_.qkv, call_.type, token_[i] * 3 * channels() + at_channel), call_.type, head_dim(), row);
    else if (call_.pad_qkv)
      load_row(at(call_.pad_qkv, call_.type, at_channel), call_.type, head_dim(), row);
    else
      for (int64_t d = 0; d < head_dim(); ++d) row[d] = 0;
  }

  // `part` of all tokens as columns (head_dim, padded n) and, if `rows` is given, as rows (padded n, width).
  // The padding of both is zero.
  void pack(int part, T* columns, T* rows) {
    for (int64_t first = 0; first < padded_tokens_; first += kTokenAlignment) {
      for (int64_t i = 0; i < kTokenAlignment; ++i) {
        T* staged = stage_ + i * head_dim();
        if (first + i < tokens_)
          load_part(first + i, part, staged);
        else
          for (int64_t d = 0; d < head_dim(); ++d) staged[d] = 0;
        if (rows) copy_padded(staged, rows + (first + i) * width_);
      }
      if (columns)
        for (int64_t d = 0; d < head_dim(); ++d)
          for (int64_t i = 0; i < kTokenAlignment; ++i)
            columns[d * padded_tokens_ + first + i] = stage_[i * head_dim() + d];
    }
  }

  // head_dim elements as a row of `width` with a zero tail.
  void copy_padded(const T* from, T* row) const {
    for (int64_t d = 0; d < head_dim(); ++d) row[d] = from[d];
    for (int64_t d = head_dim(); d < width_; ++d) row[d] = 0;
  }

  // What any score of another region can reach beyond |q| · max_key_norm: see the top of this file.
  // NaN where a key, value or bias is not finite.
  void bound_other_regions(const T* key_columns, const T* values) {
    T largest = 0, total = 0;
    for (int64_t k = 0; k < padded_tokens_; k += kLanes<T>) {
      Vec<T> squares = {};
      for (int64_t d = 0; d < head_dim(); ++d) {
        const Vec<T> x = load(key_columns + d * padded_tokens_ + k);
        squares += x * x;
      }
      largest = max_lanes<T>(max<T>(squares, broadcast(largest)));
      total += sum_lanes<T>(squares);
    }
    for (int64_t i = 0; i < tokens_ * width_; ++i) total += values[i] * 0;
    max_key_norm_ = std::sqrt(largest) + total * 0;
    bias_and_mask_ = bias_column<T>(call_, head_)[bias_table_length(call_.plan->grid)] + mask();
  }

  static T mask() { return static_cast<T>(kMaskValue * kLog2E); }

  // Whether keys of other regions may matter to a query of norm² `query_square` (in base 2 units) whose
  // scores reach `score`.
  bool others_matter(T query_square, T score) const {
    return !(std::sqrt(query_square) * max_key_norm_ + bias_and_mask_ - score < static_cast<T>(kNegligible));
  }

  // Multiply columns [begin, end) of a row of weights by 0 or 1 / (1 - dropout_p).
  void drop(int64_t query, int64_t begin, int64_t end, const T* from, T* to) const {
    const int64_t row = (batch_window_ * call_.heads + head_) * tokens_ + pattern_->raster[query];
    const uint32_t hash = dropout_row_hash(call_.seed, row), threshold = dropout_threshold(call_.dropout_p);
    const T kept = static_cast<T>(1 / (1 - call_.dropout_p));
    const int64_t real_end = end < tokens_ ? end : tokens_;
    for (int64_t k = begin; k < real_end; ++k)
      to[k] = dropout_keep(hash, static_cast<uint32_t>(pattern_->raster[k]), threshold) ? from[k] * kept : T(0);
    for (int64_t k = real_end; k < end; ++k) to[k] = 0;
  }

  // Bias rows of a tile's queries: from the pattern's tile for their own region's columns ...
  void own_bias_rows(const int64_t* queries, const T** bias_rows) const {
    const T* tile = bias_tile<T>(call_, pattern_ - call_.patterns, head_);
    for (int r = 0; r < kRows; ++r) bias_rows[r] = tile + queries[r] * padded_tokens_;
  }

  // ... or written to `buffer` (kRows, padded n) for all columns.
  void whole_bias_rows(const int64_t* queries, T* buffer, const T** bias_rows) const {
    for (int r = 0; r < kRows; ++r) {
      fill_bias_row(call_, *pattern_, bias_column<T>(call_, head_), queries[r], 0, padded_tokens_,
                    buffer + r * padded_tokens_);
      bias_rows[r] = buffer + r * padded_tokens_;
    }
  }

  // Scores of a tile of queries (head_dim, kRows) of one region: tile (kRows, padded n), base 2.
  void score(const T* queries, const T* key_columns, const T* const* bias_rows, T label, int64_t begin, int64_t end,
             T* tile) const {
    const auto init = [&](int r, int64_t column) { return load(bias_rows[r] + column); };
    const auto keep = [&](int r, int64_t column, Vec<T> s) { store(tile + r * padded_tokens_ + column, s); };
    if (pattern_->region_count == 1) {
      product_rows(queries, key_columns, padded_tokens_, head_dim(), begin, end, init, keep);
      return;
    }
    const Vec<T> own = broadcast(label), lowered = broadcast(mask()), zero = {};
    const auto keep_masked = [&](int r, int64_t column, Vec<T> s) {
      keep(r, column, s + (load(label_ + column) != own ? lowered : zero));
    };
    product_rows(queries, key_columns, padded_tokens_, head_dim(), begin, end, init, keep_masked);
  }

  // Calls visit(queries, count) for tiles of up to kRows real queries of `region`; missing rows repeat the first.
  template <class Visit>
  void for_each_tile(const Region& region, const Visit& visit) const {
    int64_t queries[kRows];
    int count = 0;
    for (int64_t i = region.first; i < region.last; ++i) {
      if (token_[i] >= 0) queries[count++] = i;
      if (count == 0 || (count < kRows && i + 1 < region.last)) continue;
      for (int r = count; r < kRows; ++r) queries[r] = queries[0];
      visit(queries, count);
      count = 0;
    }
  }

 private:
  void locate(int64_t window, int64_t batch) {
    const WindowGrid& g = call_.plan->grid;
    int64_t index[kAxes];
    decode(window, g.counts, index);
    for (int64_t i = 0; i < tokens_; ++i) {
      int64_t token = batch;
      bool real = true;
      for (int axis = 0; axis < kAxes; ++axis) {
        const int64_t position = natural_position(g, axis, index[axis], pattern_->local[axis][i]);
        real &= position >= 0;
        token = token * g.spatial[axis] + position;
      }
      token_[i] = real ? token : -1;
    }
  }

  const AttentionCall& call_;
  const int64_t tokens_, padded_tokens_, width_;
  int64_t* token_;
  T* label_;
  T* stage_;
  const WindowPattern* pattern_ = nullptr;
  int64_t head_ = 0, batch_window_ = 0;
  T max_key_norm_ = 0, bias_and_mask_ = 0;
};

// Rows of a tile's queries as columns (head_dim, kRows), times `factor`; rows beyond `count` are zero.
template <class T>
SWIN_ALWAYS_INLINE void transpose_rows(const T* rows, int64_t row_stride, int count, int64_t depth, T* columns) {
  for (int64_t d = 0; d < depth; ++d)
    for (int r = 0; r < kRows; ++r) columns[d * kRows + r] = r < count ? rows[r * row_stride + d] : T(0);
}

}  // namespace SWIN_ISA
}  // namespace swin
