#include "runtime/rwkv7.hpp"

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "core/threads.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/product.hpp"
#include "kernels/relu_squared.hpp"
#include "kernels/token_shift.hpp"
#include "kernels/wkv7.hpp"
#include "kernels/wkv7_inputs.hpp"
#include "kernels/wkv7_output.hpp"

namespace rookery {

using std::int64_t;

namespace {

// So few tokens' norms and mixes are computed sooner than other threads could be told to.
constexpr int64_t few_tokens = 2;
constexpr int mixes = 6;
// Weights of one task at least, so that taking it costs little beside reading them.
constexpr int64_t task_bytes = 32 * 1024;
constexpr int tasks_a_thread = 8;
enum Mix { of_r, of_w, of_k, of_v, of_a, of_g };

}  // namespace

Rwkv7::Rwkv7(const Rwkv7Sizes& given, Weights& weights, Isa wanted, int threads) : sizes(given), isa(wanted) {
  read(given, weights);
  weights.fill(threads);
  copies_ = weights.copies();
}

void Rwkv7::read(const Rwkv7Sizes& s, Weights& weights) {
  const int64_t width = s.width;
  std::string at;
  const auto vector = [&](const std::string& name) { return weights.vector(at + name, width); };
  const auto norm = [&](const std::string& name) { return Norm{vector(name + ".weight"), vector(name + ".bias")}; };
  const auto matrix = [&](const std::string& name, int64_t out, int64_t in) {
    return weights.borrow(at + name, Order::rows, out, in);
  };
  // files hold both factors [in, out]: bad for the first, whose rows are too short to read fast, and for the second,
  // whose outputs are needed head by head
  const auto low_rank = [&](const std::string& name, int64_t rank, bool base) {
    return LowRank{base ? vector(name + "0") : std::vector<float>(),
                   weights.turned(at + name + "1", Order::columns, rank, width),
                   weights.in_blocks(at + name + "2", width, rank, s.head_dim)};
  };
  embedding_ = matrix("emb.weight", s.vocab, width);
  norm_in_ = norm("blocks.0.ln0");
  norm_out_ = norm("ln_out");
  head_ = matrix("head.weight", s.vocab, width);
  for (int64_t i = 0; i < s.layers; ++i) {
    at = "blocks." + std::to_string(i) + ".";
    Rwkv7Layer& layer = layers_.emplace_back();
    layer.norm_att = norm("ln1");
    layer.norm_ffn = norm("ln2");
    layer.mix_ffn = vector("ffn.x_k");
    layer.ffn_key = matrix("ffn.key.weight", s.hidden, width);
    layer.ffn_value = weights.turned(at + "ffn.value.weight", Order::rows, width, s.hidden);
    at += "att.";
    for (const char* name : {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g"}) {
      const auto mix = vector(name);
      layer.mix_att.insert(layer.mix_att.end(), mix.begin(), mix.end());
    }
    layer.receptance = matrix("receptance.weight", width, width);
    layer.key = matrix("key.weight", width, width);
    layer.value = matrix("value.weight", width, width);
    layer.output = matrix("output.weight", width, width);
    layer.decay = low_rank("w", s.decay_rank, true);
    layer.rate = low_rank("a", s.rate_rank, true);
    if (i > 0) layer.residual = low_rank("v", s.value_rank, true);
    layer.gate = low_rank("g", s.gate_rank, false);
    layer.k_k = vector("k_k");
    layer.k_a = vector("k_a");
    layer.r_k = vector("r_k");
    layer.norm_heads = norm("ln_x");
  }
}

// What the tokens of one call go through, step by step; each step is shared out among the threads.
class Rwkv7Pass {
 public:
  Rwkv7Pass(
      const Rwkv7& model, Workspace& memory, std::span<const std::int32_t> tokens, std::span<const Segment> segments,
      std::span<const std::int32_t> wanted, int64_t first, float* logits, int threads)
      : model_(model), sizes_(model.sizes), tokens_(tokens), segments_(segments), wanted_(wanted), first_(first),
        logits_(logits), threads_(threads), count_(static_cast<int64_t>(tokens.size())),
        sparse_(count_ <= product_.few_tokens) {
    starts_.push_back(0);
    for (const Segment& segment : segments) starts_.push_back(starts_.back() + segment.tokens);
    memory.fit([&] { place(memory); });
  }

  void run() {
    embed();
    for (std::size_t i = 0; i < model_.layers_.size(); ++i) {
      time_mix(i);
      channel_mix(i);
    }
    head();
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  // One of several products that run side by side.
  struct Job {
    const Matrix* matrix;
    Product product;
    void (*then)(float* x, int64_t count);
  };

  int64_t rows() const { return static_cast<int64_t>(segments_.size()); }
  int64_t number_of_parts() const { return (sizes_.hidden + part_inputs - 1) / part_inputs; }
  // Floats for one head: 11 inputs and results of up to wkv7_chunk tokens, one of them with a row more.
  int64_t head_floats() const { return (11 * std::min(count_, wkv7_chunk) + 1) * sizes_.head_dim; }

  void place(Workspace& memory) {
    const int64_t n = count_, width = n * sizes_.width;
    const int64_t ranks = sizes_.decay_rank + sizes_.rate_rank + sizes_.value_rank + sizes_.gate_rank;
    for (float** x : {&x_, &normed_, &r_, &k_, &v_, &v_first_, &decay_, &rate_, &residual_, &gate_, &y_})
      *x = memory.take(width);
    mixed_ = memory.take(mixes * width);
    previous_ = memory.take(rows() * sizes_.width);
    hidden_ = memory.take(n * sizes_.hidden);
    partial_ = memory.take(sparse_ ? number_of_parts() * width : 0);
    active_ = reinterpret_cast<std::int32_t*>(memory.take(sizes_.hidden));
    low_ = memory.take(n * ranks);
    heads_ = memory.take(sizes_.heads() * head_floats());
  }

  float* state(std::size_t row, std::size_t layer) const {
    return segments_[row].state + static_cast<int64_t>(layer) * sizes_.layer_state();
  }

  // work(range) for parts of 0 … total − 1, cut at multiples of `unit`; each costs `bytes` of reading.
  template <class Work>
  void shared_out(int64_t total, int64_t unit, int64_t bytes, Work&& work) const {
    const int64_t units = (total + unit - 1) / unit;
    const int64_t most = count_ > few_tokens ? units : std::max<int64_t>(1, total * bytes / task_bytes);
    const int64_t tasks = threads_ == 1 ? 1 : std::min<int64_t>({units, most, threads_ * tasks_a_thread});
    parallel_for(static_cast<int>(tasks), threads_, [&](int task) {
      const auto cut = [&](int64_t i) { return std::min(total, units * i / tasks * unit); };
      work(Range{cut(task), cut(task + 1)});
    });
  }

  // work(range) for parts of the tokens.
  template <class Work>
  void by_tokens(Work&& work) const {
    if (count_ <= few_tokens)
      work(Range{0, count_});
    else
      shared_out(count_, 1, 0, work);
  }

  void embed() {
    const Matrix& embedding = model_.embedding_;
    const auto widen = elementwise_.widen[static_cast<int>(embedding.format)];
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t) {
        float* x = x_ + t * sizes_.width;
        const auto at = static_cast<std::size_t>(tokens_[static_cast<std::size_t>(t)]) *
                        static_cast<std::size_t>(sizes_.width) * bytes_of(embedding.format);
        widen(static_cast<const std::byte*>(embedding.data) + at, x, sizes_.width);
        norm(model_.norm_in_, x, x);
      }
    });
  }

  void norm(const Norm& norm, const float* x, float* out) const {
    elementwise_.layer_norm(x, norm.weight.data(), norm.bias.data(), sizes_.layer_norm_eps, out, sizes_.width);
  }

  // Norm and token shift of x into `mixed_`; at `offset` a layer's state keeps the last input.
  void shift(std::size_t layer, const Norm& weights, const std::vector<float>& mix, int64_t offset) {
    const int64_t width = sizes_.width;
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t) norm(weights, x_ + t * width, normed_ + t * width);
    });
    for (std::size_t row = 0; row < segments_.size(); ++row) {
      float* last = state(row, layer) + offset;
      std::copy_n(last, width, previous_ + static_cast<int64_t>(row) * width);
      std::copy_n(normed_ + (starts_[row + 1] - 1) * width, width, last);
    }
    const TokenShift shift{count_,  width,     static_cast<int64_t>(mix.size()) / width, starts_.data(),
                           normed_, previous_, mix.data()};
    by_tokens([&](Range range) { token_shift_.forward[0](shift, mixed_, range.begin, range.end); });
  }

  void multiply(const Matrix& matrix, const Product& product, Range outputs) const {
    product_.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](
        matrix, product, outputs.begin, outputs.end);
  }

  Product dense(const float* x, int64_t x_stride, float* y, int64_t y_stride, bool add = false) const {
    return {x, x_stride, y, y_stride, count_, add};
  }

  static int64_t bytes_of_output(const Matrix& matrix) {
    return matrix.in * static_cast<int64_t>(bytes_of(matrix.format));
  }

  // The jobs' outputs are numbered one after the other and shared out: all have the same number of inputs.
  void side_by_side(std::span<const Job> jobs) const {
    int64_t total = 0;
    for (const Job& job : jobs) total += job.matrix->out;
    shared_out(total, 16, bytes_of_output(*jobs[0].matrix), [&](Range range) {
      int64_t first = 0;
      for (const Job& job : jobs) {
        const Range part{std::max(range.begin - first, int64_t{0}), std::min(range.end - first, job.matrix->out)};
        first += job.matrix->out;
        if (part.begin >= part.end) continue;
        multiply(*job.matrix, job.product, part);
        if (job.then)
          for (int64_t t = 0; t < count_; ++t)
            job.then(job.product.y + t * job.product.y_stride + part.begin, part.end - part.begin);
      }
    });
  }

  void time_mix(std::size_t i) {
    const Rwkv7Layer& layer = model_.layers_[i];
    const int64_t width = sizes_.width;
    shift(i, layer.norm_att, layer.mix_att, 0);

    float* low = low_;
    std::array<float*, 4> hidden{};
    std::array<Job, 7> jobs;
    std::size_t used = 0;
    const auto job = [&](const Matrix& matrix, Mix mix, float* y, void (*then)(float*, int64_t)) {
      jobs[used++] = {&matrix, dense(mixed_ + mix * count_ * width, width, y, matrix.out), then};
    };
    const auto low_rank = [&](const LowRank& map, Mix mix, void (*then)(float*, int64_t)) {
      float* y = low;
      low += count_ * map.first.out;
      job(map.first, mix, y, then);
      return y;
    };
    job(layer.receptance, of_r, r_, nullptr);
    job(layer.key, of_k, k_, nullptr);
    job(layer.value, of_v, v_, nullptr);
    hidden[0] = low_rank(layer.decay, of_w, elementwise_.hyperbolic_tangent);
    hidden[1] = low_rank(layer.rate, of_a, nullptr);
    hidden[2] = low_rank(layer.gate, of_g, elementwise_.logistic);
    if (i > 0) hidden[3] = low_rank(layer.residual, of_v, nullptr);
    side_by_side(std::span(jobs).first(used));

    shared_out(sizes_.heads(), 1, task_bytes, [&](Range range) {
      for (int64_t head = range.begin; head < range.end; ++head) {
        second_factors(layer, hidden, head);
        for (std::size_t row = 0; row < segments_.size(); ++row) recur(layer, i, head, row);
      }
    });
    shared_out(width, 16, bytes_of_output(layer.output), [&](Range range) {
      multiply(layer.output, dense(y_, width, x_, width, true), range);
    });
  }

  // A head's second low-rank factors, and the mix of its values with the first layer's.
  void second_factors(const Rwkv7Layer& layer, const std::array<float*, 4>& hidden, int64_t head) const {
    const int64_t width = sizes_.width, n = sizes_.head_dim, channel = head * n;
    const auto second = [&](const LowRank& map, const float* low, float* y) {
      Matrix block = map.second;
      block.data = static_cast<const std::byte*>(block.data) + static_cast<std::size_t>(head) * block.bytes();
      if (!map.base.empty())
        for (int64_t t = 0; t < count_; ++t) std::copy_n(map.base.data() + channel, n, y + t * width + channel);
      multiply(block, dense(low, block.in, y + channel, width, !map.base.empty()), {0, n});
    };
    second(layer.decay, hidden[0], decay_);
    second(layer.rate, hidden[1], rate_);
    second(layer.gate, hidden[2], gate_);
    if (hidden[3]) second(layer.residual, hidden[3], residual_);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * width + channel;
      if (hidden[3])
        elementwise_.approach(v_ + at, v_first_ + at, residual_ + at, n);
      else
        std::copy_n(v_ + at, n, v_first_ + at);
    }
  }

  // One head of one segment: from projections to the input of the output projection.
  void recur(const Rwkv7Layer& layer, std::size_t i, int64_t head, std::size_t row) const {
    const int64_t n = sizes_.head_dim, width = sizes_.width, channel = head * n;
    const int64_t end = starts_[row + 1], most = std::min(count_, wkv7_chunk);
    float* piece = heads_ + head * head_floats();
    const auto take = [&](int64_t tokens) { return std::exchange(piece, piece + tokens * n); };
    float *r = take(most), *k = take(most), *v = take(most), *decay = take(most), *rate = take(most);
    float *gate = take(most), *w = take(most), *key = take(most), *b = take(most), *y = take(most), *a = take(most + 1);
    float* matrix = state(row, i) + width + channel * n;
    for (int64_t t = starts_[row]; t < end; t += most) {
      const int64_t count = std::min(most, end - t);
      const auto gather = [&](const float* from, float* to) {
        for (int64_t m = 0; m < count; ++m) std::copy_n(from + (t + m) * width + channel, n, to + m * n);
      };
      gather(r_, r);
      gather(k_, k);
      gather(v_, v);
      gather(decay_, decay);
      gather(rate_, rate);
      gather(gate_, gate);
      const Wkv7InputsArguments given{1, n, k, decay, rate, layer.k_k.data() + channel, layer.k_a.data() + channel};
      inputs_.forward[0](given, {w, key, a, b}, 0, count);
      elementwise_.exponential(w, count * n);
      std::fill_n(a + count * n, n, 0.0f);
      wkv7_.advance({count, n, n, r, w, key, a, b, v, y}, matrix);
      const Wkv7Output result{1, n, sizes_.group_norm_eps, y, r, key, v, gate, layer.r_k.data() + channel,
                              layer.norm_heads.weight.data() + channel, layer.norm_heads.bias.data() + channel};
      output_.forward[0](result, y, 0, count);
      for (int64_t m = 0; m < count; ++m) std::copy_n(y + m * n, n, y_ + (t + m) * width + channel);
    }
  }

  void channel_mix(std::size_t i) {
    const Rwkv7Layer& layer = model_.layers_[i];
    shift(i, layer.norm_ffn, layer.mix_ffn, sizes_.layer_state() - sizes_.width);
    if (sparse_)
      sparse_channel_mix(layer);
    else
      dense_channel_mix(layer);
  }

  // Hidden units `range`: relu(key · input)².
  void hidden_units(const Rwkv7Layer& layer, Range range) {
    const int64_t hidden = sizes_.hidden;
    multiply(layer.ffn_key, dense(mixed_, sizes_.width, hidden_, hidden), range);
    for (int64_t t = 0; t < count_; ++t)
      relu_squared_.forward[0](hidden_ + t * hidden, hidden_ + t * hidden, range.begin, range.end);
  }

  void dense_channel_mix(const Rwkv7Layer& layer) {
    shared_out(sizes_.hidden, 16, bytes_of_output(layer.ffn_key), [&](Range range) { hidden_units(layer, range); });
    shared_out(sizes_.width, 16, bytes_of_output(layer.ffn_value), [&](Range range) {
      multiply(layer.ffn_value, dense(hidden_, sizes_.hidden, x_, sizes_.width, true), range);
    });
  }

  // From hidden units straight to their part of the output, without reading the columns of those that are zero; whole
  // columns, because shorter pieces with gaps between them are read at half the speed.
  void sparse_channel_mix(const Rwkv7Layer& layer) {
    const int64_t width = sizes_.width, hidden = sizes_.hidden, parts = number_of_parts();
    shared_out(parts, 1, part_inputs * bytes_of_output(layer.ffn_key), [&](Range range) {
      const Range units{range.begin * part_inputs, std::min(hidden, range.end * part_inputs)};
      hidden_units(layer, units);
      Product product = dense(hidden_, hidden, partial_, width);
      product.active = active_ + units.begin;
      product.active_count = find_active(active_ + units.begin, units);
      product.part_stride = count_ * width;
      product.part_begin = range.begin;
      product.part_end = range.end;
      multiply(layer.ffn_value, product, {0, width});
      model_.ffn_reads.fetch_add(product.active_count, std::memory_order_relaxed);
      model_.ffn_columns.fetch_add(units.end - units.begin, std::memory_order_relaxed);
    });
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t)
        elementwise_.add_parts(x_ + t * width, partial_ + t * width, parts, count_ * width, width);
    });
  }

  // Hidden units of `range` that are not zero for every token.
  int64_t find_active(std::int32_t* list, Range range) const {
    int64_t found = 0;
    for (int64_t j = range.begin; j < range.end; ++j) {
      bool is_active = false;
      for (int64_t t = 0; t < count_; ++t) is_active |= hidden_[t * sizes_.hidden + j] != 0;
      list[found] = static_cast<std::int32_t>(j);
      found += is_active;
    }
    return found;
  }

  void head() {
    const int64_t width = sizes_.width, wanted = static_cast<int64_t>(wanted_.size());
    if (wanted == 0) return;
    for (int64_t i = 0; i < wanted; ++i)
      norm(model_.norm_out_, x_ + (wanted_[static_cast<std::size_t>(i)] - first_) * width, y_ + i * width);
    Product product = dense(y_, width, logits_, sizes_.vocab);
    product.tokens = wanted;
    shared_out(sizes_.vocab, 16, bytes_of_output(model_.head_), [&](Range range) {
      multiply(model_.head_, product, range);
    });
  }

  const Rwkv7& model_;
  const Rwkv7Sizes& sizes_;
  const ProductKernels& product_ = product_kernels(model_.isa);
  const ElementwiseKernels& elementwise_ = elementwise_kernels(model_.isa);
  const TokenShiftKernels& token_shift_ = token_shift_kernels(model_.isa);
  const ReluSquaredKernels& relu_squared_ = relu_squared_kernels(model_.isa);
  const Wkv7InputsKernels& inputs_ = wkv7_inputs_kernels(model_.isa);
  const Wkv7Kernels& wkv7_ = wkv7_kernels(model_.isa);
  const Wkv7OutputKernels& output_ = wkv7_output_kernels(model_.isa);

  std::span<const std::int32_t> tokens_;
  std::span<const Segment> segments_;
  std::span<const std::int32_t> wanted_;
  int64_t first_;  // number of the first token among those of the whole call
  float* logits_;
  int threads_;
  int64_t count_;
  bool sparse_;
  std::vector<int64_t> starts_;

  // [tokens, width]; mixed_ [mixes, tokens, width]; previous_ [rows, width]
  float *x_, *normed_, *mixed_, *previous_, *r_, *k_, *v_, *v_first_, *decay_, *rate_, *residual_, *gate_, *y_;
  // [tokens, hidden]; [parts, tokens, width]; [map, tokens, rank]; [heads, …]
  float *hidden_, *partial_, *low_, *heads_;
  std::int32_t* active_;  // [hidden]
};

void Rwkv7::forward(
    std::span<const std::int32_t> tokens, std::span<const Segment> segments, std::span<const std::int32_t> wanted,
    float* logits, int threads) const {
  if (threads <= 0) threads = available_cores();
  // so many tokens share one reading of the weights; more would only take more memory
  const int64_t most = std::clamp<int64_t>(196608 / sizes.width, 32, 256);
  auto memory = workspaces_.take();
  std::vector<Segment> piece;
  int64_t first = 0, count = 0;
  std::size_t answered = 0;
  const auto flush = [&] {
    std::size_t next = answered;
    while (next < wanted.size() && wanted[next] < first + count) ++next;
    Rwkv7Pass pass(
        *this, *memory, tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), piece,
        wanted.subspan(answered, next - answered), first, logits + static_cast<int64_t>(answered) * sizes.vocab,
        threads);
    pass.run();
    answered = next;
    first += count;
    count = 0;
    piece.clear();
  };
  for (Segment segment : segments)
    while (segment.tokens > 0) {
      const int64_t some = std::min(segment.tokens, most - count);
      piece.push_back({segment.state, some});
      segment.tokens -= some;
      count += some;
      if (count == most) flush();
    }
  if (count > 0) flush();
  workspaces_.give(std::move(memory));
}

}  // namespace rookery
