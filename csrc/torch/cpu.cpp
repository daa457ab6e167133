// The CPU kernels as operators of torch, through the stable ABI: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "checks.h"
#include "memory.h"

namespace {

using swin::AttentionCall;
using swin::BackwardCall;
using swin::ElementType;
using swin::ForwardCall;
using swin::kAxes;
using swin::KernelTable;
using swin::ProjectedBackwardCall;
using swin::ProjectedForwardCall;
using swin::WindowChunk;
using swin::WindowGrid;
using swin::WindowPlan;
using swin::WorkCounter;
using swin_torch::empty_on_large_pages;
using swin_torch::grid_of;
using swin_torch::Ints;
using swin_torch::require;
using swin_torch::shape;
using swin_torch::text;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLargestWindow = int64_t{1} << 12;  // tokens that window_attention takes: 16³
constexpr int64_t kMostWindows = INT32_MAX;           // of a volume, as WindowPlan counts them

void require_dense(const char* op, const char* name, const Tensor& t) {
  require(t.is_cpu(), op, name, " is not on the CPU");
  require(t.is_contiguous(), op, name, " is not contiguous");
}

void require_shape(const char* op, const char* name, const Tensor& t, const Ints& wanted) {
  require_dense(op, name, t);
  require(shape(t) == wanted, op, name, " has shape ", text(shape(t)), "; accepted is ", text(wanted));
}

ElementType element_type(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::Double: return ElementType::kFloat64;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: require(false, op, name, " has a dtype that is not float32, float64, bfloat16 or float16");
  }
  return ElementType::kFloat32;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(p);
}

const KernelTable& kernels() {
  const char* error = nullptr;
  const KernelTable* table = swin::select_kernels(&error);
  if (table == nullptr) {
    const char* wanted = std::getenv("SWIN_KERNELS_ISA");
    throw std::runtime_error("SWIN_KERNELS_ISA=" + std::string(wanted ? wanted : "") + " " + error);
  }
  return *table;
}

// Runs worker(i) once on every thread; the workers share a counter of work items.
template <class Worker>
void run_workers(int64_t workers, const Worker& worker) {
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) worker(i);
  });
}

// The arguments that forward and backward share, checked, and the memory their kernels work in.
struct Attention {
  WindowPlan plan;
  Ints volume;  // (B, *S)
  int64_t channels;
  size_t accumulate_bytes;
  ScalarType accumulate_type;
  int64_t workers;
  Buffer bias_columns;

  Attention(const char* op, const Tensor& qkv, const Tensor& bias_table, const std::optional<Tensor>& pad_qkv,
            const std::optional<Tensor>& seed, const Ints& nominal, const Ints& window, const Ints& shift, double scale,
            double dropout_p, AttentionCall& call, int64_t parts_to_project = 1)
      : plan(plan_of(op, qkv, nominal, window, shift)), volume(shape(qkv)), workers(torch::stable::get_num_threads()) {
    volume.pop_back();
    require_dense(op, "qkv", qkv);
    const int64_t table_length = swin::bias_table_length(plan.grid);
    require(bias_table.dim() == 2 && bias_table.size(0) == table_length && bias_table.size(1) >= 1, op,
            "bias_table has shape ", text(shape(bias_table)), "; accepted is (", table_length, ", heads)");
    require_dense(op, "bias_table", bias_table);
    call.heads = bias_table.size(1);
    const int64_t qkv_channels = qkv.size(qkv.dim() - 1) * parts_to_project;
    require(qkv_channels > 0 && qkv_channels % (3 * call.heads) == 0, op, "qkv has ", qkv_channels, " channels; with ",
            call.heads, " heads it must be a multiple of ", 3 * call.heads);
    call.type = element_type(op, "qkv", qkv);
    call.bias_type = element_type(op, "bias_table", bias_table);
    require(call.bias_type == call.type || call.bias_type == ElementType::kFloat32, op,
            "bias_table must have the dtype of qkv or float32");
    require(call.type == ElementType::kFloat64 || call.bias_type != ElementType::kFloat64, op,
            "bias_table must have the dtype of qkv or float32");
    if (pad_qkv) {
      require_shape(op, "pad_qkv", *pad_qkv, {qkv_channels});
      require(pad_qkv->scalar_type() == qkv.scalar_type(), op, "pad_qkv must have the dtype of qkv");
    }
    require(dropout_p >= 0 && dropout_p < 1, op, "dropout_p is ", dropout_p, "; accepted is 0 <= dropout_p < 1");
    require(dropout_p == 0 || seed, op, "seed is missing; dropout needs one");
    if (seed) {
      require_shape(op, "seed", *seed, {1});
      require(seed->scalar_type() == ScalarType::Long, op, "seed must be int64");
    }
    channels = qkv_channels / 3;
    call.plan = &plan;
    call.patterns = plan.patterns.data();
    call.pattern_count = static_cast<int64_t>(plan.patterns.size());
    call.windows = plan.windows.data();
    call.batch = volume[0];
    call.head_dim = channels / call.heads;
    call.scale = scale;
    call.qkv = qkv.const_data_ptr();
    call.bias_table = bias_table.const_data_ptr();
    call.pad_qkv = pad_qkv ? pad_qkv->const_data_ptr() : nullptr;
    call.dropout_p = dropout_p;
    call.seed = seed ? *static_cast<const int64_t*>(seed->const_data_ptr()) : 0;
    accumulate_type = call.type == ElementType::kFloat64 ? ScalarType::Double : ScalarType::Float;
    accumulate_bytes = call.type == ElementType::kFloat64 ? 8 : 4;
    call.bias_stride = swin::bias_stride(plan.grid);
    bias_columns = allocate(accumulate_bytes * static_cast<size_t>(call.heads * call.bias_stride));
    call.bias_columns = bias_columns.get();
  }

  // A plan of the windows is only made for windows that this backend takes (backends/cpu/__init__.py).
  static WindowPlan plan_of(const char* op, const Tensor& qkv, const Ints& nominal, const Ints& window,
                            const Ints& shift) {
    require(qkv.dim() == 4 || qkv.dim() == 5, op, "qkv has shape ", text(shape(qkv)),
            "; accepted is (B, H, W, 3C) or (B, D, H, W, 3C)");
    const Ints sizes = shape(qkv), spatial(sizes.begin() + 1, sizes.end() - 1);
    const WindowGrid grid = grid_of(op, spatial, nominal, window, shift);
    const bool any = sizes.front() > 0;
    require(swin::product(grid.window) <= kLargestWindow, op, "window_size ", text(window), " holds more than ",
            kLargestWindow, " tokens");
    require(!any || swin::product(grid.counts) <= kMostWindows, op, "window_size ", text(window), " cuts a volume of ",
            text(spatial), " into more than ", kMostWindows, " windows");
    return WindowPlan(grid, any);
  }

  Ints with_channels(int64_t c) const {
    Ints sizes = volume;
    sizes.push_back(c);
    return sizes;
  }

  void prepare_bias(const KernelTable& table, const AttentionCall& call) const {
    WorkCounter next{0};
    run_workers(workers, [&](int64_t) { table.prepare_bias(call, next); });
  }

  // One piece of scratch memory per worker.
  Buffer scratch(const KernelTable& table, const AttentionCall& call, bool backward, size_t* bytes) const {
    *bytes = (table.attention_scratch(call, backward) + 63) / 64 * 64;
    return allocate(*bytes * static_cast<size_t>(workers));
  }
};

Tensor zeros(const Ints& sizes, const Tensor& like) {
  Tensor tensor = torch::stable::empty(sizes, like.scalar_type());
  return torch::stable::zero_(tensor);
}

// Work items of at most `size` windows. The windows of the first pattern, in most volumes the most and the
// dearest, come first.
std::vector<WindowChunk> window_chunks(const AttentionCall& call, int64_t size) {
  std::vector<WindowChunk> chunks;
  for (int64_t p = 0; p < call.pattern_count; ++p) {
    const int64_t windows = (call.patterns[p].window_end - call.patterns[p].window_begin) * call.batch;
    for (int64_t begin = 0; begin < windows; begin += size)
      for (int64_t head = 0; head < call.heads; ++head)
        chunks.push_back({p, head, begin, std::min(begin + size, windows)});
  }
  return chunks;
}

// Windows of an item of work. A projected one does all heads.
constexpr int64_t kForwardChunk = 4, kBackwardChunk = 24, kProjectedBackwardChunk = 8;

std::tuple<Tensor, Tensor> window_attention_forward(Tensor qkv, Tensor bias_table, std::optional<Tensor> pad_qkv,
                                                    std::optional<Tensor> seed, Ints nominal, Ints window, Ints shift,
                                                    double scale, double dropout_p) {
  const char* op = "window_attention";
  ForwardCall call{};
  const Attention attention(op, qkv, bias_table, pad_qkv, seed, nominal, window, shift, scale, dropout_p, call);
  Tensor out = empty_on_large_pages(attention.with_channels(attention.channels), qkv.scalar_type());
  Tensor lse = torch::stable::empty(attention.with_channels(call.heads), attention.accumulate_type);
  call.out = out.mutable_data_ptr();
  call.lse = lse.mutable_data_ptr();
  if (call.batch > 0) {
    const KernelTable& table = kernels();
    size_t bytes;
    const Buffer scratch = attention.scratch(table, call, false, &bytes);
    attention.prepare_bias(table, call);
    const std::vector<WindowChunk> chunks = window_chunks(call, kForwardChunk);
    WorkCounter next{0};
    run_workers(attention.workers, [&](int64_t i) {
      table.attention_forward(call, chunks.data(), static_cast<int64_t>(chunks.size()),
                              static_cast<char*>(scratch.get()) + static_cast<size_t>(i) * bytes, next);
    });
  }
  return {out, lse};
}

// Whether qkv = x · weightᵀ + bias of `channels` channels can be computed window by window, inside the attention.
bool projects(int64_t heads, int64_t channels, bool backward) {
  require(heads >= 1 && channels >= 1, "projects", "heads is ", heads, " and channels is ", channels,
          "; accepted are 1 and more");
  AttentionCall call{};
  call.heads = heads;
  call.head_dim = channels / heads;
  return channels % heads == 0 && kernels().projects(call, backward);
}

using OptionalTensor = std::optional<Tensor>;

// Fills in what forward and backward share, checked.
template <class ProjectedCall>
void set_projection(const char* op, bool backward, const Attention& attention, const Tensor& x, const Tensor& weight,
                    const OptionalTensor& bias, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                    std::optional<double> norm_eps, const OptionalTensor& out_weight, const OptionalTensor& out_bias,
                    ProjectedCall& call) {
  require(projects(call.heads, attention.channels, backward) && call.type == ElementType::kFloat32 &&
              call.bias_type == call.type,
          op, "has no kernel for ", call.heads, " heads of ", call.head_dim, " channels in this dtype here");
  require_shape(op, "weight", weight, {3 * attention.channels, attention.channels});
  require(weight.scalar_type() == x.scalar_type(), op, "weight must have the dtype of x");
  const auto given = [&](const char* name, const OptionalTensor& t, const Ints& wanted) -> const float* {
    if (!t) return nullptr;
    require_shape(op, name, *t, wanted);
    require(t->scalar_type() == x.scalar_type(), op, name, " must have the dtype of x");
    return static_cast<const float*>(t->const_data_ptr());
  };
  call.normalize = norm_eps.has_value();
  call.norm_weight = given("norm_weight", norm_weight, {attention.channels});
  call.norm_bias = given("norm_bias", norm_bias, {attention.channels});
  call.norm_eps = static_cast<float>(norm_eps.value_or(0));
  call.qkv = nullptr;
  call.pad_qkv = nullptr;
  call.x = static_cast<const float*>(x.const_data_ptr());
  call.weight = static_cast<const float*>(weight.const_data_ptr());
  call.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  require(out_weight || !out_bias, op, "out_bias is given without out_weight");
  call.out_weight = given("out_weight", out_weight, {attention.channels, attention.channels});
  call.out_bias = given("out_bias", out_bias, {attention.channels});
}

// The result, and for a gradient the attention's output where a layer comes after it, and the log-sum-exp.
std::tuple<Tensor, Tensor, Tensor> projected_window_attention_forward(
    Tensor x, Tensor weight, OptionalTensor bias, Tensor bias_table, OptionalTensor norm_weight,
    OptionalTensor norm_bias, std::optional<double> norm_eps, OptionalTensor out_weight, OptionalTensor out_bias,
    Ints nominal, Ints window, Ints shift, double scale, bool for_backward) {
  const char* op = "projected_window_attention";
  ProjectedForwardCall call{};
  const Attention attention(op, x, bias_table, bias, std::nullopt, nominal, window, shift, scale, 0, call, 3);
  set_projection(op, false, attention, x, weight, bias, norm_weight, norm_bias, norm_eps, out_weight, out_bias, call);
  Tensor out = empty_on_large_pages(shape(x), x.scalar_type());
  const bool apart = for_backward && out_weight;
  Tensor attended =
      apart ? empty_on_large_pages(shape(x), x.scalar_type()) : torch::stable::empty(Ints{0}, x.scalar_type());
  Tensor lse =
      torch::stable::empty(for_backward ? attention.with_channels(call.heads) : Ints{0}, attention.accumulate_type);
  call.out = (apart ? attended : out).mutable_data_ptr();
  call.projected_out = static_cast<float*>(out.mutable_data_ptr());
  call.lse = for_backward ? lse.mutable_data_ptr() : nullptr;
  if (call.batch > 0) {
    const KernelTable& table = kernels();
    const size_t bytes = (table.projected_forward_scratch(call) + 63) / 64 * 64;
    const Buffer scratch = allocate(bytes * static_cast<size_t>(attention.workers));
    attention.prepare_bias(table, call);
    const std::vector<WindowChunk> chunks = window_chunks(call, kForwardChunk);
    WorkCounter next{0};
    run_workers(attention.workers, [&](int64_t i) {
      table.projected_forward(call, chunks.data(), static_cast<int64_t>(chunks.size()),
                              static_cast<char*>(scratch.get()) + static_cast<size_t>(i) * bytes, next);
    });
  }
  return {out, attended, lse};
}

std::tuple<Tensor, Tensor, Tensor> projected_window_attention_backward(
    Tensor grad_out, Tensor x, Tensor weight, OptionalTensor bias, Tensor bias_table, OptionalTensor norm_weight,
    OptionalTensor norm_bias, std::optional<double> norm_eps, OptionalTensor out_weight, OptionalTensor out_bias,
    Tensor attended, Tensor lse, Ints nominal, Ints window, Ints shift, double scale) {
  const char* op = "projected_window_attention_backward";
  ProjectedBackwardCall call{};
  const Attention attention(op, x, bias_table, bias, std::nullopt, nominal, window, shift, scale, 0, call, 3);
  set_projection(op, true, attention, x, weight, bias, norm_weight, norm_bias, norm_eps, out_weight, out_bias, call);
  require_shape(op, "grad_out", grad_out, shape(x));
  require_shape(op, "attended", attended, shape(x));
  require_shape(op, "lse", lse, attention.with_channels(call.heads));
  require(grad_out.scalar_type() == x.scalar_type(), op, "grad_out must have the dtype of x");
  require(attended.scalar_type() == x.scalar_type(), op, "attended must have the dtype of x");
  require(lse.scalar_type() == attention.accumulate_type, op, "lse must be float32");

  const int64_t parameters = swin::projection_parameters(attention.channels);
  Tensor grad_x = empty_on_large_pages(shape(x), x.scalar_type());
  if (call.batch == 0) return {grad_x, zeros({parameters}, x), zeros(shape(bias_table), bias_table)};
  Tensor grad_projection = torch::stable::empty(Ints{parameters}, x.scalar_type());
  Tensor grad_bias_table = torch::stable::empty(shape(bias_table), bias_table.scalar_type());
  const std::vector<WindowChunk> chunks = window_chunks(call, kProjectedBackwardChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const int64_t table_length = swin::bias_table_length(attention.plan.grid);
  const Buffer bias_partials = allocate(sizeof(float) * static_cast<size_t>(count * table_length));
  const Buffer bias_sums = allocate(sizeof(float) * static_cast<size_t>(call.heads * table_length));
  const Buffer projection_partials = allocate(sizeof(float) * static_cast<size_t>(count / call.heads * parameters));
  call.grad_out = grad_out.const_data_ptr();
  call.attended = static_cast<const float*>(attended.const_data_ptr());
  call.lse = lse.const_data_ptr();
  call.grad_bias_table = grad_bias_table.mutable_data_ptr();
  call.bias_partials = bias_partials.get();
  call.bias_sums = bias_sums.get();
  call.grad_x = static_cast<float*>(grad_x.mutable_data_ptr());
  call.grad_projection = static_cast<float*>(grad_projection.mutable_data_ptr());
  call.projection_partials = static_cast<float*>(projection_partials.get());

  const KernelTable& table = kernels();
  const size_t bytes = (table.projected_backward_scratch(call) + 63) / 64 * 64;
  const Buffer scratch = allocate(bytes * static_cast<size_t>(attention.workers));
  attention.prepare_bias(table, call);
  WorkCounter next{0};
  run_workers(attention.workers, [&](int64_t i) {
    table.projected_backward(call, chunks.data(), count,
                             static_cast<char*>(scratch.get()) + static_cast<size_t>(i) * bytes, next);
  });
  next = 0;
  run_workers(attention.workers, [&](int64_t) { table.reduce_projected_gradients(call, chunks.data(), count, next); });
  return {grad_x, grad_projection, grad_bias_table};
}

std::tuple<Tensor, Tensor, Tensor> window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table,
                                                             std::optional<Tensor> pad_qkv, std::optional<Tensor> seed,
                                                             Tensor out, Tensor lse, Ints nominal, Ints window,
                                                             Ints shift, double scale, double dropout_p) {
  const char* op = "window_attention_backward";
  BackwardCall call{};
  const Attention attention(op, qkv, bias_table, pad_qkv, seed, nominal, window, shift, scale, dropout_p, call);
  const Ints out_shape = attention.with_channels(attention.channels);
  require_shape(op, "grad_out", grad_out, out_shape);
  require_shape(op, "out", out, out_shape);
  require_shape(op, "lse", lse, attention.with_channels(call.heads));
  require(grad_out.scalar_type() == qkv.scalar_type(), op, "grad_out must have the dtype of qkv");
  require(out.scalar_type() == qkv.scalar_type(), op, "out must have the dtype of qkv");
  require(lse.scalar_type() == attention.accumulate_type, op, "lse must be float32, or float64 for float64 qkv");

  Tensor grad_qkv = empty_on_large_pages(shape(qkv), qkv.scalar_type());
  if (call.batch == 0) return {grad_qkv, zeros(shape(bias_table), bias_table), zeros({3 * attention.channels}, qkv)};
  Tensor grad_bias_table = torch::stable::empty(shape(bias_table), bias_table.scalar_type());
  Tensor grad_pad_qkv = torch::stable::empty(Ints{3 * attention.channels}, qkv.scalar_type());
  const std::vector<WindowChunk> chunks = window_chunks(call, kBackwardChunk);
  const int64_t count = static_cast<int64_t>(chunks.size());
  const size_t table_bytes =
      attention.accumulate_bytes * static_cast<size_t>(swin::bias_table_length(attention.plan.grid));
  const Buffer bias_partials = allocate(table_bytes * static_cast<size_t>(count));
  const Buffer bias_sums = allocate(table_bytes * static_cast<size_t>(call.heads));
  const Buffer pad_partials = allocate(attention.accumulate_bytes * static_cast<size_t>(count * 2 * call.head_dim));
  call.grad_out = grad_out.const_data_ptr();
  call.lse = lse.const_data_ptr();
  call.grad_qkv = grad_qkv.mutable_data_ptr();
  call.grad_bias_table = grad_bias_table.mutable_data_ptr();
  call.grad_pad_qkv = grad_pad_qkv.mutable_data_ptr();
  call.bias_partials = bias_partials.get();
  call.bias_sums = bias_sums.get();
  call.pad_partials = pad_partials.get();

  const KernelTable& table = kernels();
  size_t bytes;
  const Buffer scratch = attention.scratch(table, call, true, &bytes);
  attention.prepare_bias(table, call);
  WorkCounter next{0};
  run_workers(attention.workers, [&](int64_t i) {
    table.attention_backward(call, chunks.data(), count,
                             static_cast<char*>(scratch.get()) + static_cast<size_t>(i) * bytes, next);
  });
  next = 0;
  run_workers(attention.workers, [&](int64_t) { table.reduce_gradients(call, chunks.data(), count, next); });
  return {grad_qkv, grad_bias_table, grad_pad_qkv};
}

Tensor window_partition(Tensor x, Ints window, Ints shift) {
  const char* op = "window_partition";
  require(x.dim() == 4 || x.dim() == 5, op, "x has shape ", text(shape(x)),
          "; accepted is (B, H, W, C) or (B, D, H, W, C)");
  require_dense(op, "x", x);
  const Ints sizes = shape(x);
  const WindowGrid grid = grid_of(op, Ints(sizes.begin() + 1, sizes.end() - 1), window, window, shift);
  const int64_t windows = sizes.front() * swin::product(grid.counts);
  Tensor result = torch::stable::empty(Ints{windows, swin::product(grid.window), sizes.back()}, x.scalar_type());
  const int64_t token_bytes = sizes.back() * static_cast<int64_t>(x.element_size());
  const swin::PartitionCall call{&grid, token_bytes, x.const_data_ptr(), result.mutable_data_ptr()};
  torch::stable::parallel_for(0, windows, 1, [&](int64_t b, int64_t e) { swin::partition_windows(call, b, e); });
  return result;
}

Tensor window_reverse(Tensor windows, Ints window, Ints shift, Ints spatial) {
  const char* op = "window_reverse";
  require_dense(op, "windows", windows);
  const WindowGrid grid = grid_of(op, spatial, window, window, shift);
  const int64_t per_volume = swin::product(grid.counts);
  require(windows.dim() == 3 && windows.size(0) % per_volume == 0 && windows.size(1) == swin::product(grid.window), op,
          "windows has shape ", text(shape(windows)), "; accepted is (a multiple of ", per_volume, ", ",
          swin::product(grid.window), ", C)");
  Ints sizes{windows.size(0) / per_volume};
  sizes.insert(sizes.end(), spatial.begin(), spatial.end());
  sizes.push_back(windows.size(2));
  Tensor result = torch::stable::empty(sizes, windows.scalar_type());
  const int64_t token_bytes = windows.size(2) * static_cast<int64_t>(windows.element_size());
  const swin::PartitionCall call{&grid, token_bytes, windows.const_data_ptr(), result.mutable_data_ptr()};
  torch::stable::parallel_for(0, windows.size(0), 1, [&](int64_t b, int64_t e) { swin::reverse_windows(call, b, e); });
  return result;
}

// The index arithmetic itself, for the test that holds it against swin_kernels/geometry.py.
std::tuple<Tensor, Tensor> window_tokens(Ints spatial, Ints window, Ints shift) {
  const WindowGrid grid = grid_of("window_tokens", spatial, window, window, shift);
  const int64_t windows = swin::product(grid.counts), tokens = swin::product(grid.window);
  Tensor index = torch::stable::empty(Ints{windows, tokens}, ScalarType::Long);
  Tensor label = torch::stable::empty(Ints{windows, tokens}, ScalarType::Long);
  int64_t* index_data = static_cast<int64_t*>(index.mutable_data_ptr());
  int64_t* label_data = static_cast<int64_t*>(label.mutable_data_ptr());
  for (int64_t w = 0; w < windows; ++w) {
    int64_t place[kAxes];
    swin::decode(w, grid.counts, place);
    for (int64_t t = 0; t < tokens; ++t) {
      int64_t local[kAxes];
      swin::decode(t, grid.window, local);
      int64_t token = 0, region = 0;
      bool real = true;
      for (int axis = 0; axis < kAxes; ++axis) {
        const int64_t position = swin::natural_position(grid, axis, place[axis], local[axis]);
        real &= position >= 0;
        token = token * grid.spatial[axis] + position;
        region = region * 3 + swin::region_along(grid, axis, place[axis], local[axis]);
      }
      index_data[w * tokens + t] = real ? token : -1;
      label_data[w * tokens + t] = region;
    }
  }
  return {index, label};
}

Tensor bias_index(Ints nominal, int64_t tokens) {
  const char* op = "bias_index";
  const WindowGrid grid = grid_of(op, nominal, nominal, nominal, Ints(nominal.size(), 0));
  require(tokens >= 0 && tokens <= swin::product(grid.nominal), op, "tokens is ", tokens, "; accepted is 0 to ",
          swin::product(grid.nominal));
  Tensor index = torch::stable::empty(Ints{tokens, tokens}, ScalarType::Long);
  int64_t* data = static_cast<int64_t*>(index.mutable_data_ptr());
  for (int64_t q = 0; q < tokens; ++q)
    for (int64_t k = 0; k < tokens; ++k)
      *data++ = swin::bias_raster(grid, q) - swin::bias_raster(grid, k) + swin::bias_origin(grid);
  return index;
}

Tensor dropout_keep(Tensor seed, Tensor rows, int64_t tokens, double dropout_p) {
  const char* op = "dropout_keep";
  require_shape(op, "seed", seed, {1});
  require_dense(op, "rows", rows);
  require(seed.scalar_type() == ScalarType::Long && rows.scalar_type() == ScalarType::Long, op,
          "seed and rows must be int64");
  require(tokens >= 0 && tokens <= kLargestWindow, op, "tokens is ", tokens, "; accepted is 0 to ", kLargestWindow);
  require(dropout_p >= 0 && dropout_p < 1, op, "dropout_p is ", dropout_p, "; accepted is 0 <= dropout_p < 1");
  Ints sizes = shape(rows);
  sizes.push_back(tokens);
  Tensor keep = torch::stable::empty(sizes, ScalarType::Bool);
  const int64_t* row = static_cast<const int64_t*>(rows.const_data_ptr());
  bool* data = static_cast<bool*>(keep.mutable_data_ptr());
  const uint32_t threshold = swin::dropout_threshold(dropout_p);
  for (int64_t i = 0; i < rows.numel(); ++i) {
    const uint32_t hash = swin::dropout_row_hash(*static_cast<const int64_t*>(seed.const_data_ptr()), row[i]);
    for (int64_t k = 0; k < tokens; ++k) *data++ = swin::dropout_keep(hash, static_cast<uint32_t>(k), threshold);
  }
  return keep;
}

std::string isa() { return kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(swin_kernels_cpu, m) {
  m.def(
      "window_attention_forward(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, int[] nominal, "
      "int[] window, int[] shift, float scale, float dropout_p) -> (Tensor, Tensor)");
  m.def(
      "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, Tensor? seed, "
      "Tensor out, Tensor lse, int[] nominal, int[] window, int[] shift, float scale, float dropout_p) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "projected_window_attention_forward(Tensor x, Tensor weight, Tensor? bias, Tensor bias_table, "
      "Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, Tensor? out_weight, Tensor? out_bias, "
      "int[] nominal, int[] window, int[] shift, float scale, bool for_backward) -> (Tensor, Tensor, Tensor)");
  m.def(
      "projected_window_attention_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor bias_table, Tensor? norm_weight, Tensor? norm_bias, float? norm_eps, Tensor? out_weight, "
      "Tensor? out_bias, Tensor attended, Tensor lse, int[] nominal, int[] window, int[] shift, float scale) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("projects(int heads, int channels, bool backward) -> bool");
  m.def("window_partition(Tensor x, int[] window, int[] shift) -> Tensor");
  m.def("window_reverse(Tensor windows, int[] window, int[] shift, int[] spatial) -> Tensor");
  m.def("window_tokens(int[] spatial, int[] window, int[] shift) -> (Tensor, Tensor)");
  m.def("bias_index(int[] nominal, int tokens) -> Tensor");
  m.def("dropout_keep(Tensor seed, Tensor rows, int tokens, float dropout_p) -> Tensor");
  m.def("isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CPU, m) {
  m.impl("window_attention_forward", TORCH_BOX(&window_attention_forward));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
  m.impl("projected_window_attention_forward", TORCH_BOX(&projected_window_attention_forward));
  m.impl("projected_window_attention_backward", TORCH_BOX(&projected_window_attention_backward));
  m.impl("window_partition", TORCH_BOX(&window_partition));
  m.impl("window_reverse", TORCH_BOX(&window_reverse));
  m.impl("dropout_keep", TORCH_BOX(&dropout_keep));
}

STABLE_TORCH_LIBRARY_IMPL(swin_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("window_tokens", TORCH_BOX(&window_tokens));
  m.impl("bias_index", TORCH_BOX(&bias_index));
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("projects", TORCH_BOX(&projects));
}
