#include "runtime/pass.hpp"

#include <array>

namespace rookery {

using std::int64_t;

namespace {
// Outputs of a matrix by columns that must not be cut.
int64_t unit_of(const Matrix& matrix) {
  return is_packed(matrix.format) ? packing(matrix.format).outputs_of_line() : 16;
}
}  // namespace

Pass::Pass(const Model& model, const Call& call, int64_t mixes)
    : model_(model), sizes_(model.sizes), tokens_(call.tokens), segments_(call.segments), threads_(call.threads),
      count_(static_cast<int64_t>(call.tokens.size())), wanted_(call.wanted), first_(call.first),
      logits_(call.logits), mixes_(std::max<int64_t>(mixes, 2)), sparse_(count_ <= product_.few_tokens) {
  starts_.push_back(0);
  for (const Segment& segment : segments_) {
    const Range tokens{starts_.back(), starts_.back() + segment.tokens};
    starts_.push_back(tokens.end);
    if (!segment.adapter) continue;
    adapter_rank_ = std::max(adapter_rank_, segment.adapter->largest_rank());
    if (!adapted_.empty() && adapted_.back().adapter == segment.adapter && adapted_.back().tokens.end == tokens.begin)
      adapted_.back().tokens.end = tokens.end;
    else
      adapted_.push_back({segment.adapter, tokens});
  }
}

void Pass::run(Workspace& memory) {
  memory.fit([&] {
    const int64_t width = count_ * sizes_.width;
    for (float** x : {&x_, &normed_, &y_, &gate_}) *x = memory.take(width);
    mixed_ = memory.take(mixes_ * width);
    previous_ = memory.take(rows() * sizes_.width);
    hidden_ = memory.take(count_ * sizes_.hidden);
    partial_ = memory.take(sparse_ ? number_of_parts() * width : 0);
    active_ = reinterpret_cast<std::int32_t*>(memory.take(sizes_.hidden));
    slot_ = prepared_floats(count_, std::max(sizes_.width, model_.largest_rank_));
    prepared_ = memory.take(mixes_ * slot_);
    hidden_prepared_ = memory.take(prepared_floats(count_, sizes_.hidden));
    factors_ = memory.take(most_jobs * count_ * model_.largest_rank_);
    adapter_factors_ = memory.take(most_jobs * count_ * adapter_rank_);
    take_for_guesses(memory);
    place(memory);
  });
  embed();
  watch_.mark(StepPart::embedding);
  for (std::size_t i = 0; i < static_cast<std::size_t>(sizes_.layers); ++i) {
    time_mix(i);
    channel_mix(i);
    watch_.mark(StepPart::channel_mix);
    if (sizes_.rescale_every > 0 && (static_cast<int64_t>(i) + 1) % sizes_.rescale_every == 0)
      std::for_each_n(x_, count_ * sizes_.width, [](float& x) { x *= 0.5f; });
  }
  head();
  watch_.mark(StepPart::head);
}

void Pass::embed() {
  const Matrix& embedding = model_.embedding_;
  by_tokens([&](Range range) {
    for (int64_t t = range.begin; t < range.end; ++t) {
      float* x = x_ + t * sizes_.width;
      const int64_t token = tokens_[static_cast<std::size_t>(t)];
      if (model_.cache_) {
        auto* row = reinterpret_cast<std::byte*>(normed_ + t * sizes_.width);  // large enough for any format
        model_.cache_->read(token, row, model_.lite_counts);
        elementwise_.widen[static_cast<int>(embedding.format)](row, x, sizes_.width);
      } else if (is_packed(embedding.format)) {
        product_.row(embedding, token, x);
      } else {
        const auto at = static_cast<std::size_t>(token * sizes_.width) * bytes_of(embedding.format);
        elementwise_.widen[static_cast<int>(embedding.format)](
            static_cast<const std::byte*>(embedding.data) + at, x, sizes_.width);
      }
      norm(model_.norm_in_, x, x);
    }
  });
}

void Pass::shift(std::size_t layer, const Norm& weights, const std::vector<float>& mix, int64_t offset) {
  const int64_t width = sizes_.width;
  by_tokens([&](Range range) {
    for (int64_t t = range.begin; t < range.end; ++t) norm(weights, x_ + t * width, normed_ + t * width);
  });
  for (std::size_t row = 0; row < segments_.size(); ++row) {
    float* last = state(row, layer) + offset;
    inherit(row, layer, offset, width);
    std::copy_n(last, width, previous_ + static_cast<int64_t>(row) * width);
    std::copy_n(normed_ + (starts_[row + 1] - 1) * width, width, last);
  }
  const TokenShift shift{count_,  width,     static_cast<int64_t>(mix.size()) / width, starts_.data(),
                         normed_, previous_, mix.data()};
  by_tokens([&](Range range) { token_shift_.forward[0](shift, mixed_, range.begin, range.end); });
  watch_.mark(StepPart::mix);
}

Product Pass::prepared(const Matrix& matrix, Product product, int64_t slot) const {
  if (!is_prepared(product_, matrix) || matrix.order == Order::columns) return product;
  prepare(product_, matrix, product, prepared_ + slot * slot_);
  by_tokens([&](Range range) {
    fill(product_, product, 0, matrix.in, range.begin, std::min(range.end, product.tokens));
  });
  return product;
}

void Pass::side_by_side(std::span<const Job> jobs) const {
  std::array<Job, most_jobs> now, then;
  std::size_t late = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    now.at(i) = jobs[i];
    if (!jobs[i].first) continue;
    const int64_t rank = jobs[i].first->out;
    float* low = factors_ + static_cast<int64_t>(late) * count_ * model_.largest_rank_;
    then.at(late) = {jobs[i].matrix, dense(low, rank, jobs[i].product.y, jobs[i].product.y_stride), jobs[i].then};
    now[i] = {jobs[i].first, dense(jobs[i].product.x, jobs[i].product.x_stride, low, rank), nullptr};
    ++late;
  }
  at_once(std::span(now).first(jobs.size()));
  if (late) at_once(std::span(then).first(late));
  watch_.mark(StepPart::projections);
}

void Pass::at_once(std::span<const Job> jobs) const {
  std::array<Product, most_jobs> products;
  int64_t total = 0, slot = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    total += jobs[i].matrix->out;
    products.at(i) = prepared(*jobs[i].matrix, jobs[i].product, slot);
    slot += products[i].integers.values || products[i].rounded.values;
  }
  first_factors(jobs, adapted_);
  shared_out(total, unit(), jobs[0].matrix->bytes_of_output(), [&](Range range) {
    int64_t first = 0;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
      const Job& job = jobs[i];
      const Range part{std::max(range.begin - first, int64_t{0}), std::min(range.end - first, job.matrix->out)};
      first += job.matrix->out;
      if (part.empty()) continue;
      multiply(*job.matrix, products[i], part);
      add_second_factors(*job.matrix, products[i], static_cast<int64_t>(i), adapted_, part);
      if (job.then)
        for (int64_t t = 0; t < count_; ++t)
          job.then(job.product.y + t * job.product.y_stride + part.begin, part.end - part.begin);
    }
  });
}

void Pass::second_factor(const LowRank& map, int64_t number, const float* low, float* y) const {
  Matrix block = map.second;
  block.data = static_cast<const std::byte*>(block.data) + static_cast<std::size_t>(number) * block.bytes();
  const int64_t width = sizes_.width, channel = number * block.out;
  const bool base = !map.base.empty();
  if (base)
    for (int64_t t = 0; t < count_; ++t) std::copy_n(map.base.data() + channel, block.out, y + t * width + channel);
  multiply(block, dense(low, block.in, y + channel, width, base), {0, block.out});
}

void Pass::add_output(const Matrix& matrix) {
  watch_.mark(StepPart::recurrence);
  const Product product = prepared(matrix, dense(y_, sizes_.width, x_, sizes_.width, true));
  shared_out(sizes_.width, unit(), matrix.bytes_of_output(), [&](Range range) { multiply(matrix, product, range); });
  add_change(matrix, product);
  watch_.mark(StepPart::output);
}

// The receptance's outputs are shared out behind the hidden units.
void Pass::channel_mix(std::size_t i) {
  const ChannelMix& mix = model_.channel_mixes_[i];
  const int64_t width = sizes_.width, hidden = sizes_.hidden;
  shift(i, mix.norm, mix.mix, sizes_.layer_state() - width);
  const int64_t cut = sparse_ ? part_inputs : unit(), units = (hidden + cut - 1) / cut * cut;
  const bool guesses = mix.sparsity.is_on();
  if (guesses) guess_units(mix);
  Product gate = dense(mixed_ + count_ * width, width, gate_, width);
  if (const Matrix& first = mix.receptance.first; first.out > 0) {
    const Job job{&first, dense(gate.x, width, factors_, first.out), nullptr};
    at_once({&job, 1});
    gate = dense(factors_, first.out, gate_, width);
  }
  gate = prepared(mix.receptance, gate, 1);
  const Product key = prepared(mix.key, dense(mixed_, width, hidden_, hidden));
  first_factors(std::array{Job{&mix.key, key, nullptr}, Job{&mix.receptance, gate, nullptr}}, adapted_);
  shared_out(units + mix.receptance.out, cut, mix.key.bytes_of_output(), [&](Range range) {
    const Range of_hidden{range.begin, std::min(range.end, hidden)};
    const Range of_gate{std::max(range.begin, units) - units, range.end - units};
    if (!of_hidden.empty()) {
      if (guesses && sparse_ && model_.file_) {
        use_units(mix, key, of_hidden);
      } else {
        if (guesses)
          guessed_units(mix, key, of_hidden);
        else
          hidden_units(mix, key, of_hidden);
        if (sparse_) hidden_columns(mix, of_hidden);
      }
    }
    if (of_gate.empty()) return;
    multiply(mix.receptance, gate, of_gate);
    add_second_factors(mix.receptance, gate, 1, adapted_, of_gate);
  });
  if (!mix.has_gate()) {
    add_hidden_columns(mix, x_);
    return;
  }
  std::fill_n(y_, count_ * width, 0.0f);
  add_hidden_columns(mix, y_);
  by_tokens([&](Range range) {
    const int64_t at = range.begin * width, count = (range.end - range.begin) * width;
    elementwise_.add_gated(x_ + at, y_ + at, gate_ + at, count);
  });
}

// Hidden units `range`: relu(key · input)².
void Pass::hidden_units(const ChannelMix& mix, const Product& key, Range range) {
  const int64_t hidden = sizes_.hidden;
  multiply(mix.key, key, range);
  add_second_factors(mix.key, key, 0, adapted_, range);
  for (int64_t t = 0; t < count_; ++t)
    relu_squared_.forward[0](hidden_ + t * hidden, hidden_ + t * hidden, range.begin, range.end);
}

// From hidden units straight to their part of the output, without reading the columns of those that are zero; whole
// columns, because shorter pieces with gaps between them are read at half the speed.
void Pass::hidden_columns(const ChannelMix& mix, Range units) {
  const int64_t width = sizes_.width;
  Product product = dense(hidden_, sizes_.hidden, partial_ - mix.value_from, width);
  const auto find = [&](auto&& is_not_zero) {
    product.active = active_ + units.begin;
    product.active_count = find_active(active_ + units.begin, units, is_not_zero);
  };
  prepare(product_, mix.value, product, hidden_prepared_);
  fill(product_, product, units.begin, units.end, 0, count_);
  if (const auto& rounded = product.rounded; rounded.values)
    find([&](int64_t t, int64_t j) { return (rounded.values[t * rounded.stride + j] & 0x7fff) != 0; });
  else if (const auto& integers = product.integers; integers.values)
    find([&](int64_t t, int64_t j) { return integers.values[t * integers.stride + j] != 0; });
  else
    find([&](int64_t t, int64_t j) { return hidden_[t * sizes_.hidden + j] != 0; });
  product.part_stride = count_ * width;
  product.part_begin = units.begin / part_inputs;
  product.part_end = (units.end + part_inputs - 1) / part_inputs;
  multiply(mix.value, product, {mix.value_from, mix.value_from + width});
  model_.ffn_reads.fetch_add(product.active_count, std::memory_order_relaxed);
  model_.ffn_columns.fetch_add(units.end - units.begin, std::memory_order_relaxed);
}

// Adds what all hidden units give.
void Pass::add_hidden_columns(const ChannelMix& mix, float* y) {
  const int64_t width = sizes_.width;
  if (sparse_)
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t)
        elementwise_.add_parts(y + t * width, partial_ + t * width, number_of_parts(), count_ * width, width);
    });
  else
    multiply_hidden(mix.value, mix.value_from, y);
  add_change(mix.value, dense(hidden_, sizes_.hidden, y, width));
}

void Pass::multiply_hidden(const Matrix& value, int64_t from, float* y) {
  Product product = dense(hidden_, sizes_.hidden, y - from, sizes_.width, true);
  prepare(product_, value, product, hidden_prepared_);
  by_tokens([&](Range range) { fill(product_, product, 0, sizes_.hidden, range.begin, range.end); });
  shared_out(sizes_.width, std::max(unit(), unit_of(value)), value.bytes_of_output(), [&](Range range) {
    multiply(value, product, {from + range.begin, from + range.end});
  });
}

void Pass::head() {
  const int64_t width = sizes_.width, wanted = static_cast<int64_t>(wanted_.size());
  if (wanted == 0) return;
  for (int64_t i = 0; i < wanted; ++i)
    norm(model_.norm_out_, x_ + (wanted_[static_cast<std::size_t>(i)] - first_) * width, y_ + i * width);
  if (model_.clusters_.is_on()) {
    for (int64_t i = 0; i < wanted; ++i) head_by_clusters(i);
    return;
  }
  Product product = dense(y_, width, logits_, sizes_.vocab);
  product.tokens = wanted;
  product = prepared(model_.head_, product);
  const auto adapted = wanted_adapted();
  first_factors(std::array{Job{&model_.head_, product, nullptr}}, adapted);
  shared_out(sizes_.vocab, unit(), model_.head_.bytes_of_output(), [&](Range range) {
    multiply(model_.head_, product, range);
    add_second_factors(model_.head_, product, 0, adapted, range);
  });
}

}  // namespace rookery
