// The forward of window attention on AMX, float32 with head_dim 16: the products on tiles of bfloat16 parts (amx.h),
// 2^score between them on vectors.
//
// Every query has the same offset 0 in its softmax, so that scores are turned into weights at once and no row is read
// twice. That is safe while no score comes near the ends of float32's range, which Cauchy-Schwarz tells before any
// score is computed; the same bound tells that keys of other regions do not matter. Windows where it does not hold go
// to the vector kernel.
#pragma once

#include "cpu/amx.h"
#include "cpu/projected_window_attention/output_projection.h"
#include "cpu/projected_window_attention/projection_amx.h"
#include "cpu/window_attention/forward.h"

namespace swin {
namespace SWIN_ISA {
namespace window_attention {

class AmxForwardWorker : ForwardWorker<float, 16> {
  using Base = ForwardWorker<float, 16>;

 public:
  static constexpr int64_t kHeadDim = 16;

  AmxForwardWorker(const ForwardCall& call, Arena& arena) : AmxForwardWorker(call, nullptr, arena) {}
  AmxForwardWorker(const ProjectedForwardCall& call, Arena& arena) : AmxForwardWorker(call, &call, arena) {}

  // An item of work is a group of windows and a few heads, which lie side by side in memory; all heads where they are
  // projected here.
  void run(const WindowChunk* chunks, int64_t count, WorkCounter& next) {
    for (int i = 0; i < kTileRows; ++i) {
      ones_[i] = 0x3F803F80u;  // two bfloat16 of 1
      nothing_[i] = -INFINITY;
      no_row_[i] = 0;
    }
    for (const WindowParts& parts : parts_)  // the second half of the last pair, where there are no keys
      std::memset(parts.keys + (2 * pairs_ - 1) * kRightBlockBytes, 0, kRightBlockBytes);
    const TileUse tiles;
    if (projected_) {
      projection_.prepare();
      output_.prepare();
    }
    const int64_t heads = projected_ ? call_.heads : call_.heads % kHeads == 0 ? kHeads : 1;
    int64_t i = next.fetch_add(heads);
    while (i < count) {
      const WindowChunk& chunk = chunks[i];
      const int windows = static_cast<int>(chunk.end - chunk.begin);
      int64_t following = count;
      for (int64_t head = chunk.head; head < chunk.head + heads; ++head) {
        group_.enter(chunk.pattern, head);
        if (head == chunk.head) {
          for (int g = 0; g < windows; ++g) group_.place(g, chunk.begin + g);
          if ((following = next.fetch_add(heads)) < count) fetch_later(chunks[following]);
          if (projected_)
            for (int g = 0; g < windows; ++g)
              projection_.project(group_.window(g).token, group_.tokens(), window_qkv(g));
        }
        attend(windows);
      }
      if (projected_)
        for (int g = 0; g < windows; ++g) output_.project(group_.window(g).token, group_.tokens());
      while (fetch_next_ != fetch_end_) fetch();
      i = following;
    }
  }

 private:
  static constexpr int64_t kPair = 2 * kTileRows;         // keys that one tile of weights spans
  static constexpr int64_t kPairBytes = 3 * kTileBytes;   // their parts
  static constexpr int64_t kQueryBytes = 3 * kTileBytes;  // the parts of 16 queries: tiles of parts 1 1, 2 2, 1 3
  static constexpr int kLargestQueue = kGroup * kBlock / kTileRows;
  static constexpr int64_t kHeads = 3;

  // The tiles. Queries stay for a tile of 16 queries; kLeft and kRight change with every product.
  enum Tile { kSums, kTotals, kQuery11, kQuery22, kQuery13, kOnes, kLeft, kRight };

  // Parts of a window's keys and values as tiles of the right side.
  struct WindowParts {
    char* keys;    // for 16 keys, half tiles of 8 rows: parts 3, 1, 2
    char* values;  // for 32 keys, tiles: parts 1, 2, 3; key i is paired with key 16 + i
    float largest_value;
    bool values_are_copied;
  };

  // Queries [first, last) of a window, at most 16.
  struct QueryTile {
    int g;
    const GroupWindow<float>* window;
    const WindowParts* parts;
    int64_t first, last;
  };

  AmxForwardWorker(const ForwardCall& call, const ProjectedForwardCall* projected, Arena& arena)
      : Base(call, arena),
        projected_(projected),
        pairs_((group_.padded_tokens() + kPair - 1) / kPair),
        queries_(arena.take<char>(kLargestQueue * kQueryBytes)),
        scores_(arena.take<float>(2 * kPair * kTileRows)),
        weights_(arena.take<char>(2 * 3 * kTileBytes)),
        sums_(arena.take<float>(kTileRows * kHeadDim)),
        totals_(arena.take<float>(kTileRows * kTileRows)),
        ones_(arena.take<uint32_t>(kTileRows)),
        nothing_(arena.take<float>(kTileRows)),
        no_row_(arena.take<float>(kTileRows)),
        stage_(arena.take<float>(kHeadDim)),
        projection_(projected ? *projected : no_projection(), arena),
        output_(projected ? *projected : no_projection(), arena),
        qkv_(arena.take<float>(projected ? kGroup * window_qkv_size() : 0)) {
    for (WindowParts& parts : parts_) {
      parts.keys = arena.take<char>(pairs_ * 2 * kRightBlockBytes);
      parts.values = arena.take<char>(pairs_ * 3 * kTileBytes);
    }
    tokens_ = arena.take<int64_t>(group_.tokens());
    fetch_rows_ = arena.take<const char*>(kGroup * group_.tokens());
    fetch_next_ = fetch_end_ = fetch_rows_;
  }

  static const ProjectedForwardCall& no_projection() {
    static const ProjectedForwardCall none{};
    return none;
  }

  int64_t window_qkv_size() const {
    return projected_window_attention::AmxProjection::padded_rows(group_.tokens()) * 3 * group_.channels();
  }
  float* window_qkv(int g) const { return qkv_ + g * window_qkv_size(); }

  // What the next group will read lies far away: its rows are prefetched a few at a time while this group is computed,
  // so that the memory is never idle and nothing waits for it.
  void fetch_later(const WindowChunk& chunk) {
    const int64_t channels = group_.channels();
    const char* volume = static_cast<const char*>(projected_ ? projected_->x : call_.qkv);
    const int64_t row = projected_ ? channels : 3 * channels, head = projected_ ? 0 : chunk.head * kHeadDim;
    fetch_next_ = fetch_end_ = fetch_rows_;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      group_.locate(call_.patterns[chunk.pattern], i, tokens_);
      for (int64_t t = 0; t < group_.tokens(); ++t)
        if (tokens_[t] >= 0) *fetch_end_++ = volume + (tokens_[t] * row + head) * static_cast<int64_t>(sizeof(float));
    }
  }

  SWIN_ALWAYS_INLINE void fetch() {
    if (fetch_next_ == fetch_end_) return;
    constexpr int kToL2 = 2;
    const char* row = *fetch_next_++;
    const int64_t part = group_.channels() * static_cast<int64_t>(sizeof(float));
    if (projected_) {
      for (int64_t byte = 0; byte < part; byte += kTileRowBytes) __builtin_prefetch(row + byte, 0, kToL2);
    } else {
      const int64_t heads = call_.heads % kHeads == 0 ? kHeads : 1;
      for (int64_t head = 0; head < heads; ++head)
        for (int i = 0; i < 3; ++i) __builtin_prefetch(row + i * part + head * kTileRowBytes, 0, kToL2);
    }
  }

  // `part` (0 q, 1 k, 2 v) of a window's token in this head.
  const float* row(int g, int64_t t, int part) const {
    if (t >= group_.tokens()) return no_row_;
    if (projected_) return window_qkv(g) + (t * 3 + part) * group_.channels() + group_.head() * kHeadDim;
    return group_.part_row(group_.window(g).token[t], part, stage_);
  }

  void attend(int count) {
    for (int g = 0; g < count; ++g) {
      group_.window(g).queries = projected_ ? row(g, 0, 0) : nullptr;
      group_.window(g).query_stride = 3 * group_.channels();
      split_keys(g);
      split_values(g);
      parts_[g].values_are_copied = false;
    }
    for (int64_t i = 0; i < group_.pattern().region_count; ++i) {
      const Region region = region_of<float>(group_.pattern(), i);
      for (int64_t first = region.first; first < region.last; first += kBlock) {
        const int64_t last = first + kBlock < region.last ? first + kBlock : region.last;
        group_.look_up_bias(region, first, last);
        int queued = 0;
        for (int g = 0; g < count; ++g)
          for (int64_t q = first; q < last; q += kTileRows) {
            const QueryTile tile = {g, &group_.window(g), &parts_[g], q, q + kTileRows < last ? q + kTileRows : last};
            if (!has_queries(tile)) continue;
            const float norm = split_queries(tile, queries_ + queued * kQueryBytes);
            if (in_range(norm * tile.window->max_key_norm, tile.parts->largest_value)) {
              queue_[queued++] = tile;
            } else {
              copy_values(g);
              attend_block(*tile.window, region, tile.first, tile.last);
            }
          }
        if (queued > 0) attend_queue(queued, region);
      }
    }
  }

  static bool has_queries(const QueryTile& tile) {
    bool any = false;
    for (int64_t q = tile.first; q < tile.last; ++q) any |= tile.window->token[q] >= 0;
    return any;
  }

  void split_keys(int g) {
    GroupWindow<float>& window = group_.window(g);
    __m512 largest = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    for (int64_t first = 0; first < group_.padded_tokens(); first += kTileRows) {
      const float* rows[kTileRows];
      for (int i = 0; i < kTileRows; ++i) rows[i] = row(g, first + i, 1);
      float* panel = window.keys + first * kHeadDim;
      transpose_to_panel(rows, kHeadDim, panel);
      split_right_block(panel, parts_[g].keys + first / kTileRows * kRightBlockBytes);
      __m512 squares = _mm512_setzero_ps();
      for (int d = 0; d < kHeadDim; ++d) {
        const __m512 x = load(panel + d * kTileRows);
        squares += x * x;
      }
      largest = max<float>(squares, largest);
      total += squares;
    }
    window.max_key_norm =
        std::sqrt(max_lanes<float>(largest)) + sum_lanes<float>(total) * 0;  // NaN if any is not finite
  }

  void split_values(int g) {
    __m512 largest = _mm512_setzero_ps(), total = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs_; ++pair)
      for (int64_t i = 0; i < kTileRows; ++i) {
        const int64_t low = pair * kPair + i, high = low + kTileRows;
        const __m512 x = load(row(g, low, 2)), y = load(row(g, high, 2));
        const __m512 larger = max<float>(_mm512_abs_ps(x), _mm512_abs_ps(y));
        largest = max<float>(larger, largest);
        total += (x + y) * _mm512_setzero_ps();
        const Parts a = split(x), b = split(y);
        char* tile_row = parts_[g].values + pair * 3 * kTileBytes + i * kTileRowBytes;
        _mm512_store_si512(tile_row, pack_pairs(a.first, b.first));
        _mm512_store_si512(tile_row + kTileBytes, pack_pairs(a.second, b.second));
        _mm512_store_si512(tile_row + 2 * kTileBytes, pack_pairs(a.third, b.third));
      }
    parts_[g].largest_value = max_lanes<float>(largest) + sum_lanes<float>(total);
  }

  // What the vector kernel needs besides the panels of keys.
  void copy_values(int g) {
    if (parts_[g].values_are_copied) return;
    for (int64_t t = 0; t < group_.padded_tokens(); ++t)
      store(group_.window(g).values + t * kHeadDim, load(row(g, t, 2)));
    group_.bound(group_.window(g), group_.padded_tokens() * group_.width());
    parts_[g].values_are_copied = true;
  }

  // The queued tiles of queries, each against the keys of its window, 32 keys at a time: a step turns scores into
  // weights on the vector units while the tile unit works on the scores of the next step and the weights of the last.
  // The tile unit keeps up only if its instructions are spread evenly among the others.
  void attend_queue(int count, const Region& region) {
    const int64_t begin = region.begin / kPair, end = (region.end + kPair - 1) / kPair;
    const int64_t steps = count * (end - begin);
    // At either end 16 keys may only complete a pair: their bias is -inf.
    const bool first_half = region.begin % kPair == 0, last_half = region.end % kPair == 0;
    const int64_t bias_bytes = group_.padded_tokens() * static_cast<int64_t>(sizeof(float));
    const auto score_step = [&](const Step& step, int parity, int instruction) __attribute__((always_inline)) {
      const bool second = instruction >= kScoreSteps;
      const bool inside = second ? last_half || step.pair + 1 < end : first_half || step.pair > begin;
      score(step, inside ? step.bias + second * kTileRows : nothing_, inside ? bias_bytes : 0, parity, instruction);
    };
    const auto start_of = [&](int tile) {
      const QueryTile& queries = queue_[tile];
      return Step{tile, begin, group_.bias_row(queries.first) + begin * kPair, queries.parts->keys + begin * kPairBytes,
                  queries.parts->values + begin * kPairBytes};
    };
    Step last{}, now = start_of(0), next = now;
    const auto advance = [&](Step& step) __attribute__((always_inline)) {
      if (++step.pair < end) {
        step.bias += kPair;
        step.keys += kPairBytes;
        step.values += kPairBytes;
      } else {
        step = start_of(step.tile + 1);
      }
    };
    tile_load<kOnes>(ones_, 0);
    tile_zero<kSums>();
    tile_zero<kTotals>();
    load_queries(0);
    for (int i = 0; i < 2 * kScoreSteps; ++i) score_step(now, 0, i);
    for (int64_t i = 0; i < steps; ++i) {
      const int parity = i % 2;
      const bool more = i + 1 < steps, started = i > 0;
      if (more) advance(next);
      const bool new_tile = next.tile != now.tile, tile_done = started && last.tile != now.tile;
      weigh(parity, [&](int slot) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int work = 2 * slot; work < 2 * slot + 2; ++work) {
          const int summing = work - 1 - 2 * kScoreSteps;
          if (work == 0) {
            if (new_tile) load_queries(next.tile);
          } else if (summing < 0) {
            if (more) score_step(next, !parity, work - 1);
          } else if (summing < kSumSteps) {
            if (started) add_values(last, !parity, summing);
          } else if (tile_done) {
            store_sums();
          }
        }
        if (slot % 8 == 0) fetch();
      });
      if (tile_done) finish(queue_[last.tile]);
      last = now;
      now = next;
    }
    for (int i = 0; i < kSumSteps; ++i) add_values(last, (steps - 1) % 2, i);
    store_sums();
    finish(queue_[last.tile]);
  }

  // A pair of 16 keys of a tile of queries: where their parts and the bias lie.
  struct Step {
    int tile;
    int64_t pair;
    const float* bias;
    const char *keys, *values;
  };

  SWIN_ALWAYS_INLINE void load_queries(int tile) const {
    const char* queries = queries_ + tile * kQueryBytes;
    tile_load<kQuery11>(queries, kTileRowBytes);
    tile_load<kQuery22>(queries + kTileBytes, kTileRowBytes);
    tile_load<kQuery13>(queries + 2 * kTileBytes, kTileRowBytes);
  }

  // The parts of a tile of queries times scale · log2(e), as tiles of the left side; returns the largest norm.
  float split_queries(const QueryTile& tile, char* tiles) const {
    const __m512 factor = _mm512_set1_ps(static_cast<float>(call_.scale * kLog2E));
    float norm = 0;
    for (int64_t i = 0; i < kTileRows; ++i) {
      const int64_t t = tile.first + i;
      __m512 x = _mm512_setzero_ps();
      if (t < tile.last && tile.window->token[t] >= 0) x = load(row(tile.g, t, 0)) * factor;
      const float square = sum_lanes<float>(x * x);
      norm = square > norm ? square : norm;
      norm += square * 0;  // NaN stays
      split_left_row(x, i, tiles);
    }
    return std::sqrt(norm);
  }

  // Whether scores of at most `product` + bias in size, and their weighted sums, stay inside float32's range with all
  // parts normal numbers, and whether keys of other regions cannot matter. False where anything is not finite.
  bool in_range(float product, float largest_value) const {
    const float spread = group_.largest_bias() + product;
    if (!(spread < kLargestScore && largest_value < kLargestValue)) return false;
    return group_.pattern().region_count == 1 || 2 * spread + group_.mask() < static_cast<float>(kNegligible);
  }
  static constexpr float kLargestScore = 90, kLargestValue = 1 << 24;

  // Scores of twice 16 keys, an instruction at a time: queries · keys + bias.
  static constexpr int kScoreSteps = 7;
  SWIN_ALWAYS_INLINE void score(const Step& step, const float* bias, int64_t bias_bytes, int parity, int instruction) {
    const int half = instruction / kScoreSteps;
    const char* keys = step.keys + half * kRightBlockBytes;
    switch (instruction % kScoreSteps) {
      case 0: tile_load<kLeft>(bias, bias_bytes); break;
      case 1: tile_load<kRight>(keys + kTileBytes / 2, kTileRowBytes); break;  // parts 1, 2
      case 2: tile_multiply<kLeft, kQuery22, kRight>(); break;
      case 3: tile_multiply<kLeft, kQuery11, kRight>(); break;
      case 4: tile_load<kRight>(keys, kTileRowBytes); break;  // parts 3, 1
      case 5: tile_multiply<kLeft, kQuery13, kRight>(); break;
      case 6: tile_store<kLeft>(scores_ + (2 * parity + half) * kTileRows * kTileRows, kTileRowBytes); break;
    }
  }

  // Weights 2^score of 16 queries and 32 keys, in parts; calls beside(slot) for slots 0 to 15 along the way.
  template <class Beside>
  SWIN_ALWAYS_INLINE void weigh(int parity, const Beside& beside) {
    const float* low = scores_ + parity * kPair * kTileRows;
    const float* high = low + kTileRows * kTileRows;
    char* weights = weights_ + parity * 3 * kTileBytes;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; r += 2) {
      __m512 x[4] = {load(low + r * kTileRows), load(high + r * kTileRows), load(low + (r + 1) * kTileRows),
                     load(high + (r + 1) * kTileRows)};
      exp2_by_scaling<4>(x);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const Parts a = split(x[2 * i]), b = split(x[2 * i + 1]);
        char* row = weights + (r + i) * kTileRowBytes;
        _mm512_store_si512(row, pack_pairs(a.first, b.first));
        _mm512_store_si512(row + kTileBytes, pack_pairs(a.second, b.second));
        _mm512_store_si512(row + 2 * kTileBytes, pack_pairs(a.third, b.third));
        beside(r + i);
      }
    }
  }

  // Weighted sums of 32 values, and of ones, an instruction at a time.
  static constexpr int kSumSteps = 16;
  SWIN_ALWAYS_INLINE void add_values(const Step& step, int parity, int instruction) {
    const char* weights = weights_ + parity * 3 * kTileBytes;
    const char* values = step.values;
    switch (instruction) {
      case 0: tile_load<kLeft>(weights, kTileRowBytes); break;
      case 1: tile_load<kRight>(values + 2 * kTileBytes, kTileRowBytes); break;
      case 2: tile_multiply<kSums, kLeft, kRight>(); break;  // part 1 · part 3
      case 3: tile_multiply<kTotals, kLeft, kOnes>(); break;
      case 4: tile_load<kRight>(values, kTileRowBytes); break;
      case 5: tile_multiply<kSums, kLeft, kRight>(); break;  // 1 · 1
      case 6: tile_load<kRight>(values + kTileBytes, kTileRowBytes); break;
      case 7: tile_multiply<kSums, kLeft, kRight>(); break;  // 1 · 2
      case 8: tile_load<kLeft>(weights + kTileBytes, kTileRowBytes); break;
      case 9: tile_multiply<kSums, kLeft, kRight>(); break;  // 2 · 2
      case 10: tile_multiply<kTotals, kLeft, kOnes>(); break;
      case 11: tile_load<kRight>(values, kTileRowBytes); break;
      case 12: tile_multiply<kSums, kLeft, kRight>(); break;  // 2 · 1
      case 13: tile_load<kLeft>(weights + 2 * kTileBytes, kTileRowBytes); break;
      case 14: tile_multiply<kSums, kLeft, kRight>(); break;  // 3 · 1
      case 15: tile_multiply<kTotals, kLeft, kOnes>(); break;
    }
  }

  SWIN_ALWAYS_INLINE void store_sums() {
    tile_store<kSums>(sums_, kTileRowBytes);
    tile_store<kTotals>(totals_, kTileRowBytes);  // all columns alike
    tile_zero<kSums>();
    tile_zero<kTotals>();
  }

  void finish(const QueryTile& tile) const {
    alignas(64) float inverse[kTileRows], lse[kTileRows];
    const __m512i rows = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    const __m512 total = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xFFFF, rows, totals_, sizeof(float));
    store(inverse, _mm512_set1_ps(1) / total);
    if (call_.lse) store(lse, log(total));
    for (int64_t i = 0; i < tile.last - tile.first; ++i) {
      const int64_t token = tile.window->token[tile.first + i];
      if (token < 0) continue;
      store(static_cast<float*>(call_.out) + token * group_.channels() + group_.head() * kHeadDim,
            load(sums_ + i * kHeadDim) * _mm512_set1_ps(inverse[i]));
      if (call_.lse) static_cast<float*>(call_.lse)[token * call_.heads + group_.head()] = lse[i];
    }
  }

  // The natural logarithm of normal positive numbers: x = m · 2^e with √½ < m ≤ √2, and ln m = 2 artanh((m - 1)/(m +
  // 1)) by its series, whose next term is below 3e-9.
  static __m512 log(__m512 x) {
    __m512 m = _mm512_maskz_getmant_ps(0xFFFF, x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
    __m512 e = _mm512_maskz_getexp_ps(0xFFFF, x);
    const __m512 one = _mm512_set1_ps(1);
    const __mmask16 large = _mm512_cmp_ps_mask(m, _mm512_set1_ps(1.41421356f), _CMP_GT_OQ);
    m = _mm512_mask_mul_ps(m, large, m, _mm512_set1_ps(0.5f));
    e = _mm512_mask_add_ps(e, large, e, one);
    const __m512 t = (m - one) / (m + one), t2 = t * t;
    __m512 series = _mm512_set1_ps(2.0f / 9);
    for (const float coefficient : {2.0f / 7, 2.0f / 5, 2.0f / 3, 2.0f})
      series = _mm512_fmadd_ps(series, t2, _mm512_set1_ps(coefficient));
    return _mm512_fmadd_ps(e, _mm512_set1_ps(static_cast<float>(kLn2)), series * t);
  }

  const ProjectedForwardCall* projected_;  // or null
  const int64_t pairs_;
  char* queries_;  // parts of the queued tiles
  float* scores_;  // two pairs of tiles
  char* weights_;  // twice three tiles of parts
  float* sums_;    // a tile
  float* totals_;  // a tile
  uint32_t* ones_;
  float *nothing_, *no_row_, *stage_;
  projected_window_attention::AmxProjection projection_;
  projected_window_attention::OutputProjection output_;
  float* qkv_;  // of the group's windows
  WindowParts parts_[kGroup];
  QueryTile queue_[kLargestQueue];
  int64_t* tokens_;                                       // of the window being located
  const char **fetch_rows_, **fetch_next_, **fetch_end_;  // rows to ask for
};

inline bool on_tiles(const AttentionCall& call) {
  return call.type == ElementType::kFloat32 && call.head_dim == AmxForwardWorker::kHeadDim && call.dropout_p == 0;
}

}  // namespace window_attention
}  // namespace SWIN_ISA
}  // namespace swin
