// What the tokens of one call go through, step by step; each step is shared out among the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "core/threads.hpp"
#include "kernels/elementwise.hpp"
#include "kernels/prepared.hpp"
#include "kernels/product.hpp"
#include "kernels/relu_squared.hpp"
#include "kernels/shadow.hpp"
#include "kernels/token_shift.hpp"
#include "runtime/adapter.hpp"
#include "runtime/model.hpp"

namespace rookery {

struct Range {
  std::int64_t begin, end;
  bool empty() const { return begin >= end; }
};

// One of several products that run side by side; `then` is applied to what it gives.
struct Job {
  const Matrix* matrix;
  Product product;
  void (*then)(float* x, std::int64_t count);
  const Matrix* first = nullptr;  // where the matrix has two factors: the one that is applied before `matrix`
};

// Neighbouring tokens that have one adapter.
struct Adapted {
  const Adapter* adapter;
  Range tokens;
};

class Pass {
 public:
  void run(Workspace& memory);

 protected:
  // `mixes`: the most that a time mix makes of its input.
  Pass(const Model& model, const Call& call, std::int64_t mixes);
  ~Pass() = default;

  // Takes the family's own memory.
  virtual void place(Workspace&) = 0;
  // From the residual stream to the time mix's output, which is added to it.
  virtual void time_mix(std::size_t layer) = 0;

  std::int64_t rows() const { return static_cast<std::int64_t>(segments_.size()); }
  float* state(std::size_t row, std::size_t layer) const {
    return segments_[row].state + static_cast<std::int64_t>(layer) * sizes_.layer_state();
  }

  // Begins `count` numbers of a layer's state, from number `at` on, where the row's own beginning has them.
  void inherit(std::size_t row, std::size_t layer, std::int64_t at, std::int64_t count) const {
    if (const float* from = segments_[row].from)
      std::copy_n(from + static_cast<std::int64_t>(layer) * sizes_.layer_state() + at, count, state(row, layer) + at);
  }

  // work(range) for parts of 0 … total − 1, cut at multiples of `unit`; each costs `bytes` of reading.
  template <class Work>
  void shared_out(std::int64_t total, std::int64_t unit, std::int64_t bytes, Work&& work) const {
    const std::int64_t units = (total + unit - 1) / unit;
    const std::int64_t most = count_ > few_tokens ? units : std::max<std::int64_t>(1, total * bytes / task_bytes);
    const std::int64_t tasks = threads_ == 1 ? 1 : std::min<std::int64_t>({units, most, threads_ * tasks_a_thread});
    parallel_for(static_cast<int>(tasks), threads_, [&](int task) {
      const auto cut = [&](std::int64_t i) { return std::min(total, units * i / tasks * unit); };
      work(Range{cut(task), cut(task + 1)});
    });
  }

  // Outputs that are not parted: whole strips of a product with many tokens.
  std::int64_t unit() const { return sparse_ ? 16 : 64; }

  // work(range) for parts of the tokens.
  template <class Work>
  void by_tokens(Work&& work) const {
    if (count_ <= few_tokens)
      work(Range{0, count_});
    else
      shared_out(count_, 1, 0, work);
  }

  void norm(const Norm& norm, const float* x, float* out) const {
    elementwise_.layer_norm(x, norm.weight.data(), norm.bias.data(), sizes_.layer_norm_eps, out, sizes_.width);
  }

  // Norm and token shift of x into `mixed_`; at `offset` a layer's state keeps the last input.
  void shift(std::size_t layer, const Norm& weights, const std::vector<float>& mix, std::int64_t offset);

  void multiply(const Matrix& matrix, const Product& product, Range outputs) const {
    product_.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](
        matrix, product, outputs.begin, outputs.end);
  }

  Product dense(const float* x, std::int64_t x_stride, float* y, std::int64_t y_stride, bool add = false) const {
    return {x, x_stride, y, y_stride, count_, add};
  }

  // `product`, the same numbers in the form that a matrix by rows is multiplied with, where it has one of its own; the
  // slot's memory keeps them until it is used again.
  Product prepared(const Matrix& matrix, Product product, std::int64_t slot = 0) const;

  // The product of a matrix with mix number `mix` of the input.
  Job job(const Matrix& matrix, std::int64_t mix, float* y, void (*then)(float*, std::int64_t) = nullptr) const {
    return {&matrix, dense(mixed_ + mix * count_ * sizes_.width, sizes_.width, y, matrix.out), then};
  }
  Job job(const Projection& projection, std::int64_t mix, float* y) const {
    Job made = job(static_cast<const Matrix&>(projection), mix, y);
    if (projection.first.out > 0) made.first = &projection.first;
    return made;
  }
  // All of them; those of factored matrices in two steps.
  void side_by_side(std::span<const Job> jobs) const;
  // The jobs' outputs are numbered one after the other and shared out: all have the same number of inputs.
  void at_once(std::span<const Job> jobs) const;
  // Block `block` of a low-rank map's second factor, applied to low [tokens, rank]: its part of y [tokens, width].
  void second_factor(const LowRank& map, std::int64_t block, const float* low, float* y) const;
  // Adds matrix · y_ to the residual stream.
  void add_output(const Matrix& matrix);

  // So few tokens' norms and mixes are computed sooner than other threads could be told to.
  static constexpr std::int64_t few_tokens = 2;
  // Weights of one task at least, so that taking it costs little beside reading them.
  static constexpr std::int64_t task_bytes = 32 * 1024;
  static constexpr int tasks_a_thread = 8;
  static constexpr int most_jobs = 8;  // as many as any family has, and more

  const Model& model_;
  const Sizes& sizes_;
  const ProductKernels& product_ = product_kernels(model_.isa);
  const ElementwiseKernels& elementwise_ = elementwise_kernels(model_.isa);
  const TokenShiftKernels& token_shift_ = token_shift_kernels(model_.isa);
  const ReluSquaredKernels& relu_squared_ = relu_squared_kernels(model_.isa);
  const ShadowKernels& shadow_ = shadow_kernels(model_.isa);

  std::span<const std::int32_t> tokens_;
  std::span<const Segment> segments_;
  int threads_;
  std::int64_t count_;
  std::vector<std::int64_t> starts_;  // [rows + 1], numbers of the segments' first tokens

  // [tokens, width]: the residual stream, its norm, the output of a mix before its last matrix
  float *x_, *normed_, *y_;
  float *mixed_, *previous_;  // [mixes, tokens, width]; [rows, width], what was before the first tokens

 private:
  void embed();
  void channel_mix(std::size_t layer);
  void hidden_units(const ChannelMix& mix, const Product& key, Range range);
  void hidden_columns(const ChannelMix& mix, Range range);
  void guess_units(const ChannelMix& mix);
  void choose_largest(const Sparsity& guess, std::int64_t token) const;
  void guessed_units(const ChannelMix& mix, Product key, Range range);
  void unpacked_units(
      const Matrix& key, const std::int32_t* list, std::int64_t count, std::int64_t first, float* units) const;
  void use_units(const ChannelMix& mix, const Product& key, Range range);
  void fetched_units(const ChannelMix& mix, Product key, Range part);
  void fetch_units(const ChannelMix& mix, const std::int32_t* list, std::int64_t count, Range part, std::byte* to) const;
  void fetched_columns(
      const ChannelMix& mix, const std::int32_t* list, std::int64_t count, Range part, const Matrix& value);
  void exact_logits(std::int32_t cluster, const Product& product) const;
  void add_hidden_columns(const ChannelMix& mix, float* y);
  void multiply_hidden(const Matrix& value, std::int64_t from, float* y);
  // What adapters add to products, in two steps: A · x of all jobs at once, then B times that for some of the outputs.
  // `slot` is the job's place among those of the first step; `adapted` are the tokens of the product that have one.
  void first_factors(std::span<const Job> jobs, std::span<const Adapted> adapted) const;
  void add_second_factors(
      const Matrix& matrix, const Product& product, std::int64_t slot, std::span<const Adapted> adapted,
      Range outputs) const;
  // Both, of one product.
  void add_change(const Matrix& matrix, const Product& product) const;
  std::vector<Adapted> wanted_adapted() const;
  void head();
  void head_by_clusters(std::int64_t row);
  void take_for_guesses(Workspace& memory);
  // Hidden units of `range` that some token needs.
  template <class Is>
  std::int64_t find_active(std::int32_t* list, Range range, Is&& is_needed) const {
    std::int64_t found = 0;
    for (std::int64_t j = range.begin; j < range.end; ++j) {
      bool is_active = false;
      for (std::int64_t t = 0; t < count_; ++t) is_active |= is_needed(t, j);
      list[found] = static_cast<std::int32_t>(j);
      found += is_active;
    }
    return found;
  }
  std::int64_t number_of_parts() const { return (sizes_.hidden + part_inputs - 1) / part_inputs; }

  std::span<const std::int32_t> wanted_;
  std::int64_t first_;  // number of the first token among those of the whole call
  float* logits_;
  std::vector<Adapted> adapted_;
  std::int64_t adapter_rank_ = 0;  // the largest
  std::int64_t mixes_;
  bool sparse_;  // columns of hidden units that are zero are not read

  float *hidden_, *partial_, *gate_;  // [tokens, hidden]; [parts, tokens, width]; [tokens, width]
  float *prepared_, *hidden_prepared_;  // `Integers` or `Rounded` of [mixes] inputs [tokens, width], of [tokens, hidden]
  std::int64_t slot_;                   // floats of one of them
  mutable Watch watch_{model_.times};
  std::int32_t* active_;              // [hidden]
  float* factors_;                    // [jobs, tokens, rank], between the factors of projections
  float* adapter_factors_;            // the same, of adapters
  float *low_guess_, *scores_, *padded_;  // [tokens, rank], [tokens, hidden], [tokens, width filled up]: of guesses
  std::uint8_t* is_guessed_;          // [tokens, hidden]
  float *guessed_clusters_, *sorted_logits_;  // [clusters]; [vocab], in the order of clusters
};

}  // namespace rookery
