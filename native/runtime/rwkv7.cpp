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

// Few tokens: every member computes norms and mixes for itself, which is cheaper than to wait for the others.
constexpr int64_t few_tokens = 4;
constexpr int mixes = 6;
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
  // files hold both factors [in, out]: good for the second, whose outputs threads share, bad for the first, whose rows
  // are too short to read fast
  const auto low_rank = [&](const std::string& name, int64_t rank, bool base) {
    return LowRank{base ? vector(name + "0") : std::vector<float>(),
                   weights.turned(at + name + "1", Order::columns, rank, width),
                   weights.borrow(at + name + "2", Order::columns, width, rank)};
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

// What the tokens of one call go through. Every member of the team executes `run`.
class Rwkv7Pass {
 public:
  Rwkv7Pass(
      const Rwkv7& model, Workspace& memory, std::span<const std::int32_t> tokens, std::span<const Segment> segments,
      std::span<const std::int32_t> wanted, int64_t first, float* logits, int threads)
      : model_(model), sizes_(model.sizes), tokens_(tokens), segments_(segments), wanted_(wanted), first_(first),
        logits_(logits), count_(static_cast<int64_t>(tokens.size())), few_(count_ <= few_tokens), sparse_(count_ <= product_.few_tokens) {
    starts_.push_back(0);
    for (const Segment& segment : segments) starts_.push_back(starts_.back() + segment.tokens);
    place(memory, threads);
  }

  void run(Team& team, int member) {
    Member me{team, member, few_ ? private_[static_cast<std::size_t>(member)] : shared_,
              private_[static_cast<std::size_t>(member)].scratch, private_[static_cast<std::size_t>(member)].active};
    embed(me);
    team.barrier();
    for (std::size_t i = 0; i < model_.layers_.size(); ++i) {
      time_mix(me, i);
      channel_mix(me, i);
    }
    head(me);
  }

 private:
  // The input of a mixer: the normed tokens, those before the first ones, and the interpolations between them.
  struct Inputs {
    float *normed, *previous, *mixed;
    float* scratch;
    std::int32_t* active;
  };
  struct Member {
    Team& team;
    int number;
    Inputs in;
    float* scratch;
    std::int32_t* active;
  };
  struct Range {
    int64_t begin, end;
  };
  // One of several products that run side by side.
  struct Job {
    const Matrix* matrix;
    Product product;
    void (*then)(float* x, int64_t count);
  };

  // This member's part of 0 … total − 1, cut at multiples of `unit`.
  static Range share(const Member& me, int64_t total, int64_t unit) {
    const int64_t units = (total + unit - 1) / unit, size = me.team.size();
    const auto cut = [&](int64_t i) { return std::min(total, units * i / size * unit); };
    return {cut(me.number), cut(me.number + 1)};
  }

  static int64_t scratch_floats(const Rwkv7Sizes& s) { return 12 * wkv7_chunk * s.head_dim + s.head_dim; }

  void place(Workspace& memory, int threads) {
    const int64_t n = count_, width = n * sizes_.width, rows = static_cast<int64_t>(segments_.size());
    const int64_t own = few_ ? n : 0;
    const int64_t ranks = sizes_.decay_rank + sizes_.rate_rank + sizes_.value_rank + sizes_.gate_rank;
    const auto lay = [&] {
      for (float** x : {&x_, &r_, &k_, &v_, &v_first_, &decay_, &rate_, &residual_, &gate_, &y_})
        *x = memory.take(width);
      hidden_ = memory.take(n * sizes_.hidden);
      partial_ = memory.take(sparse_ ? number_of_parts() * width : 0);
      low_ = memory.take(n * ranks);
      shared_ = {memory.take(width), memory.take(rows * sizes_.width), memory.take(mixes * width), nullptr, nullptr};
      private_.resize(static_cast<std::size_t>(threads));
      for (Inputs& in : private_) {
        in.normed = memory.take(own * sizes_.width);
        in.previous = memory.take(few_ ? rows * sizes_.width : 0);
        in.mixed = memory.take(mixes * own * sizes_.width);
        in.scratch = memory.take(scratch_floats(sizes_));
        in.active = reinterpret_cast<std::int32_t*>(memory.take(sizes_.hidden));
      }
    };
    memory.fit(lay);
  }

  float* state(std::size_t row, std::size_t layer) const {
    return segments_[row].state + static_cast<int64_t>(layer) * sizes_.layer_state();
  }

  void embed(Member& me) {
    const Matrix& embedding = model_.embedding_;
    const auto widen = elementwise_.widen[static_cast<int>(embedding.format)];
    const Range mine = share(me, count_, 1);
    for (int64_t t = mine.begin; t < mine.end; ++t) {
      float* x = x_ + t * sizes_.width;
      const auto at = static_cast<std::size_t>(tokens_[static_cast<std::size_t>(t)]) *
                      static_cast<std::size_t>(sizes_.width) * bytes_of(embedding.format);
      widen(static_cast<const std::byte*>(embedding.data) + at, x, sizes_.width);
      norm(model_.norm_in_, x, x);
    }
  }

  void norm(const Norm& norm, const float* x, float* out) const {
    elementwise_.layer_norm(x, norm.weight.data(), norm.bias.data(), sizes_.layer_norm_eps, out, sizes_.width);
  }

  // Norm and token shift of x; `offset` is where a layer's state keeps the last input.
  void shift(Member& me, std::size_t layer, const Norm& weights, const std::vector<float>& mix, int64_t offset) {
    const int64_t width = sizes_.width;
    const Range mine = few_ ? Range{0, count_} : share(me, count_, 1);
    for (int64_t t = mine.begin; t < mine.end; ++t) norm(weights, x_ + t * width, me.in.normed + t * width);
    const auto rows = static_cast<int64_t>(segments_.size());
    const Range my_rows = few_ ? Range{0, rows} : share(me, rows, 1);
    for (int64_t row = my_rows.begin; row < my_rows.end; ++row)
      std::copy_n(state(static_cast<std::size_t>(row), layer) + offset, width, me.in.previous + row * width);
    if (!few_) me.team.barrier();
    if (mine.begin == mine.end) return;
    const TokenShift shift{count_,       width,          static_cast<int64_t>(mix.size()) / width, starts_.data(),
                           me.in.normed, me.in.previous, mix.data()};
    token_shift_.forward[0](shift, me.in.mixed, mine.begin, mine.end);
  }

  // Call when every member has read the states' last inputs.
  void remember(Member& me, std::size_t layer, int64_t offset) {
    if (me.number != 0) return;
    for (std::size_t row = 0; row < segments_.size(); ++row)
      std::copy_n(me.in.normed + (starts_[row + 1] - 1) * sizes_.width, sizes_.width, state(row, layer) + offset);
  }

  void multiply(const Matrix& matrix, const Product& product, Range outputs) const {
    if (outputs.begin < outputs.end)
      product_.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](
          matrix, product, outputs.begin, outputs.end);
  }

  Product dense(const float* x, int64_t x_stride, float* y, int64_t y_stride, bool add = false) const {
    return {x, x_stride, y, y_stride, count_, add};
  }

  // The jobs' outputs are numbered one after the other and cut in equal parts: all have the same number of inputs.
  void side_by_side(Member& me, std::span<const Job> jobs) const {
    int64_t total = 0;
    for (const Job& job : jobs) total += job.matrix->out;
    const Range mine = share(me, total, 16);
    int64_t first = 0;
    for (const Job& job : jobs) {
      const Range part{std::max(mine.begin - first, int64_t{0}), std::min(mine.end - first, job.matrix->out)};
      multiply(*job.matrix, job.product, part);
      if (job.then && part.begin < part.end)
        for (int64_t t = 0; t < count_; ++t)
          job.then(job.product.y + t * job.product.y_stride + part.begin, part.end - part.begin);
      first += job.matrix->out;
    }
  }

  void time_mix(Member& me, std::size_t i) {
    const Rwkv7Layer& layer = model_.layers_[i];
    const int64_t width = sizes_.width;
    shift(me, i, layer.norm_att, layer.mix_att, 0);
    if (!few_) me.team.barrier();

    float* low = low_;
    std::array<float*, 4> hidden;
    std::array<Job, 7> jobs;
    std::size_t used = 0;
    const auto job = [&](const Matrix& matrix, Mix mix, float* y, void (*then)(float*, int64_t)) {
      jobs[used++] = {&matrix, dense(me.in.mixed + mix * count_ * width, width, y, matrix.out), then};
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
    hidden[3] = i > 0 ? low_rank(layer.residual, of_v, nullptr) : nullptr;
    side_by_side(me, std::span(jobs).first(used));
    me.team.barrier();

    remember(me, i, 0);
    const Range heads = share(me, sizes_.heads(), 1);
    second_factors(layer, hidden, {heads.begin * sizes_.head_dim, heads.end * sizes_.head_dim});
    for (int64_t head = heads.begin; head < heads.end; ++head)
      for (std::size_t row = 0; row < segments_.size(); ++row) recur(me, layer, i, head, row);
    me.team.barrier();

    multiply(layer.output, dense(y_, width, x_, width, true), share(me, width, 16));
    me.team.barrier();
  }

  // Second low-rank factors of some channels, and the mix of their values with the first layer's.
  void second_factors(const Rwkv7Layer& layer, const std::array<float*, 4>& hidden, Range channels) const {
    const int64_t width = sizes_.width, count = channels.end - channels.begin;
    if (count == 0) return;
    const auto second = [&](const LowRank& map, const float* low, float* y) {
      if (!map.base.empty())
        for (int64_t t = 0; t < count_; ++t)
          std::copy_n(map.base.data() + channels.begin, count, y + t * width + channels.begin);
      multiply(map.second, dense(low, map.second.in, y, width, !map.base.empty()), channels);
    };
    second(layer.decay, hidden[0], decay_);
    second(layer.rate, hidden[1], rate_);
    second(layer.gate, hidden[2], gate_);
    if (hidden[3]) second(layer.residual, hidden[3], residual_);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * width + channels.begin;
      if (hidden[3])
        elementwise_.approach(v_ + at, v_first_ + at, residual_ + at, count);
      else
        std::copy_n(v_ + at, count, v_first_ + at);
    }
  }

  // One head of one segment: from projections to the input of the output projection.
  void recur(Member& me, const Rwkv7Layer& layer, std::size_t i, int64_t head, std::size_t row) const {
    const int64_t n = sizes_.head_dim, width = sizes_.width, channel = head * n;
    const int64_t end = starts_[row + 1];
    float* piece = me.scratch;
    const auto take = [&](int64_t count) { return std::exchange(piece, piece + count); };
    float *r = take(wkv7_chunk * n), *k = take(wkv7_chunk * n), *v = take(wkv7_chunk * n);
    float *decay = take(wkv7_chunk * n), *rate = take(wkv7_chunk * n), *gate = take(wkv7_chunk * n);
    float *w = take(wkv7_chunk * n), *key = take(wkv7_chunk * n), *b = take(wkv7_chunk * n);
    float *y = take(wkv7_chunk * n), *a = take((wkv7_chunk + 1) * n);
    float* matrix = state(row, i) + width + channel * n;
    for (int64_t t = starts_[row]; t < end; t += wkv7_chunk) {
      const int64_t count = std::min(wkv7_chunk, end - t);
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

  void channel_mix(Member& me, std::size_t i) {
    const Rwkv7Layer& layer = model_.layers_[i];
    const int64_t offset = sizes_.layer_state() - sizes_.width;
    shift(me, i, layer.norm_ffn, layer.mix_ffn, offset);
    if (!few_) me.team.barrier();
    if (sparse_)
      sparse_channel_mix(me, layer);
    else
      dense_channel_mix(me, layer);
    remember(me, i, offset);
    me.team.barrier();
  }

  // Hidden units `range`: relu(key · input)².
  void hidden_units(Member& me, const Rwkv7Layer& layer, Range range) {
    const int64_t hidden = sizes_.hidden;
    multiply(layer.ffn_key, dense(me.in.mixed, sizes_.width, hidden_, hidden), range);
    for (int64_t t = 0; t < count_; ++t)
      relu_squared_.forward[0](hidden_ + t * hidden, hidden_ + t * hidden, range.begin, range.end);
  }

  void dense_channel_mix(Member& me, const Rwkv7Layer& layer) {
    hidden_units(me, layer, share(me, sizes_.hidden, 16));
    me.team.barrier();
    multiply(layer.ffn_value, dense(hidden_, sizes_.hidden, x_, sizes_.width, true), share(me, sizes_.width, 16));
  }

  // Every member goes from its hidden units to their part of the output, reading no column whose unit is zero; whole
  // columns, because shorter pieces with gaps between them are read at half the speed.
  void sparse_channel_mix(Member& me, const Rwkv7Layer& layer) {
    const int64_t width = sizes_.width, hidden = sizes_.hidden, parts = number_of_parts();
    const Range mine = share(me, parts, 1);
    const Range units{mine.begin * part_inputs, std::min(hidden, mine.end * part_inputs)};
    if (units.begin < units.end) {
      hidden_units(me, layer, units);
      Product product{hidden_, hidden, partial_, width, count_};
      product.active = me.active;
      product.active_count = find_active(me.active, units);
      product.part_stride = count_ * width;
      product.part_begin = mine.begin;
      product.part_end = mine.end;
      multiply(layer.ffn_value, product, {0, width});
      model_.ffn_reads.fetch_add(product.active_count, std::memory_order_relaxed);
      model_.ffn_columns.fetch_add(units.end - units.begin, std::memory_order_relaxed);
    }
    me.team.barrier();
    const Range channels = share(me, width, 16);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * width + channels.begin;
      elementwise_.add_parts(x_ + at, partial_ + at, parts, count_ * width, channels.end - channels.begin);
    }
  }

  int64_t number_of_parts() const { return (sizes_.hidden + part_inputs - 1) / part_inputs; }

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

  void head(Member& me) {
    const int64_t width = sizes_.width, rows = static_cast<int64_t>(wanted_.size());
    if (rows == 0) return;
    const Range mine = share(me, rows, 1);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      norm(model_.norm_out_, x_ + (wanted_[static_cast<std::size_t>(i)] - first_) * width, y_ + i * width);
    me.team.barrier();
    Product product = dense(y_, width, logits_, sizes_.vocab);
    product.tokens = rows;
    multiply(model_.head_, product, share(me, sizes_.vocab, 16));
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
  int64_t count_;
  bool few_, sparse_;
  std::vector<int64_t> starts_;

  // [tokens, width]
  float *x_, *r_, *k_, *v_, *v_first_, *decay_, *rate_, *residual_, *gate_, *y_;
  float *hidden_, *partial_, *low_;  // [tokens, hidden], [parts, tokens, width], [map, tokens, rank]
  Inputs shared_;
  std::vector<Inputs> private_;
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
    in_team(threads, [&](Team& team, int member) { pass.run(team, member); });
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
