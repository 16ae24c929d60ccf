// The steps of compressed models: guessed hidden units, and heads computed cluster by cluster.
#include <cmath>
#include <numeric>
#include <vector>

#include "core/scratch.hpp"
#include "runtime/pass.hpp"

namespace rookery {

using std::int64_t;

namespace {

constexpr int64_t unpacked_rows = 16;  // of a packed matrix, multiplied together

void positive_part(float* x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] = x[i] < 0 ? 0 : x[i];
}

int64_t filled_up(int64_t width) { return (width + 15) / 16 * 16; }

}  // namespace

void Pass::take_for_guesses(Workspace& memory) {
  int64_t rank = 0;
  bool any = false;
  for (const ChannelMix& mix : model_.channel_mixes_) {
    rank = std::max(rank, mix.sparsity.rank);
    any |= mix.sparsity.is_on();
  }
  low_guess_ = memory.take(count_ * rank);
  scores_ = memory.take(any ? count_ * sizes_.hidden : 0);
  padded_ = memory.take(any ? count_ * filled_up(sizes_.width) : 0);
  is_guessed_ = reinterpret_cast<std::uint8_t*>(memory.take(any ? (count_ * sizes_.hidden + 3) / 4 : 0));
  const bool clustered = model_.clusters_.is_on();
  guessed_clusters_ = memory.take(clustered ? model_.clusters_.count() : 0);
  sorted_logits_ = memory.take(clustered ? sizes_.vocab : 0);
}

// Fills `is_guessed_` from the channel mix's first input.
void Pass::guess_units(const ChannelMix& mix) {
  const Sparsity& guess = mix.sparsity;
  const int64_t width = sizes_.width, hidden = sizes_.hidden, filled = filled_up(width);
  if (guess.rank > 0) {
    const Job job{&guess.first, dense(mixed_, width, low_guess_, guess.rank), positive_part};
    at_once({&job, 1});
  }
  if (guess.shadow.planes > 0)
    for (int64_t t = 0; t < count_; ++t) {
      std::copy_n(mixed_ + t * width, width, padded_ + t * filled);
      std::fill_n(padded_ + t * filled + width, filled - width, 0.0f);
    }
  const int64_t bytes = guess.second.bytes_of_output() + guess.shadow.planes * guess.shadow.line();
  const Product likely = prepared(guess.second, dense(low_guess_, guess.rank, scores_, hidden));
  shared_out(hidden, 16, bytes, [&](Range range) {
    const int64_t count = range.end - range.begin;
    if (guess.rank > 0) multiply(guess.second, likely, range);
    for (int64_t t = 0; t < count_; ++t) {
      float* scores = scores_ + t * hidden;
      std::uint8_t* is_guessed = is_guessed_ + t * hidden;
      if (guess.rank > 0)
        for (int64_t j = range.begin; j < range.end; ++j) is_guessed[j] = scores[j] > guess.least;
      else
        std::fill_n(is_guessed + range.begin, count, std::uint8_t{0});
      if (guess.shadow.planes > 0) shadow_.sums(guess.shadow, padded_ + t * filled, scores, range.begin, range.end);
    }
  });
  if (guess.shadow.planes > 0 && guess.kept > 0)
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t) choose_largest(guess, t);
    });
}

// Adds the units whose scores in the shadow are the largest; of equal ones the first.
void Pass::choose_largest(const Sparsity& guess, int64_t token) const {
  const int64_t hidden = sizes_.hidden, width = sizes_.width;
  float* scores = scores_ + token * hidden;
  std::uint8_t* is_guessed = is_guessed_ + token * hidden;
  if (!guess.base.empty()) {
    const float* x = mixed_ + token * width;
    const float sum = std::accumulate(x, x + width, 0.0f);
    for (int64_t j = 0; j < hidden; ++j) {
      const auto at = static_cast<std::size_t>(j);
      scores[j] = guess.base[at] * sum + guess.step[at] * scores[j];
    }
  }
  // what is not a number has no place in an order
  for (int64_t j = 0; j < hidden; ++j)
    if (scores[j] != scores[j]) scores[j] = -std::numeric_limits<float>::infinity();
  float* sorted = scratch(static_cast<std::size_t>(hidden));
  std::copy_n(scores, hidden, sorted);
  std::nth_element(sorted, sorted + (guess.kept - 1), sorted + hidden, std::greater<>());
  const float least = sorted[guess.kept - 1];
  int64_t left = guess.kept;
  for (int64_t j = 0; j < hidden; ++j)
    if (scores[j] > least) is_guessed[j] = 1, --left;
  for (int64_t j = 0; j < hidden && left > 0; ++j)
    if (scores[j] == least) is_guessed[j] = 1, --left;
}

// Hidden units `range`: relu(key · input)² of those that were guessed for the token, 0 of the others. With few tokens
// only rows that one of them needs are read.
void Pass::guessed_units(const ChannelMix& mix, Product key, Range range) {
  const int64_t hidden = sizes_.hidden;
  std::int32_t* list = active_ + range.begin;
  int64_t count = 0;
  if (sparse_) {
    count = find_active(list, range, [&](int64_t t, int64_t j) { return is_guessed_[t * hidden + j] != 0; });
    model_.lite_counts.units.fetch_add(count, std::memory_order_relaxed);
    model_.lite_counts.of_units.fetch_add(range.end - range.begin, std::memory_order_relaxed);
  } else {
    count = range.end - range.begin;
    std::iota(list, list + count, static_cast<std::int32_t>(range.begin));
  }
  if (is_packed(mix.key.format)) {
    unpacked_units(mix.key, list, count, 0, hidden_);
  } else {
    if (sparse_) key.outputs = list;
    multiply(mix.key, key, sparse_ ? Range{0, count} : range);
  }
  for (int64_t t = 0; t < count_; ++t) {
    float* units = hidden_ + t * hidden;
    for (int64_t j = range.begin; j < range.end; ++j)
      if (!is_guessed_[t * hidden + j]) units[j] = 0;
    relu_squared_.forward[0](units, units, range.begin, range.end);
  }
}

// Products with some units' key rows, which lie in packed columns; column 0 of `key` is unit `first`.
void Pass::unpacked_units(
    const Matrix& key, const std::int32_t* list, int64_t count, int64_t first, float* units) const {
  const int64_t width = sizes_.width;
  std::vector<float> rows(static_cast<std::size_t>(unpacked_rows * width));
  std::vector<float> results(static_cast<std::size_t>(unpacked_rows * count_));
  for (int64_t i = 0; i < count; i += unpacked_rows) {
    const int64_t some = std::min(unpacked_rows, count - i);
    for (int64_t n = 0; n < some; ++n) shadow_.column(key, list[i + n] - first, 0, width, rows.data() + n * width);
    const Matrix unpacked{rows.data(), Format::float32, Order::rows, some, width};
    multiply(unpacked, dense(mixed_, width, results.data(), unpacked_rows), {0, some});
    for (int64_t t = 0; t < count_; ++t)
      for (int64_t n = 0; n < some; ++n)
        units[t * sizes_.hidden + list[i + n]] = results[static_cast<std::size_t>(t * unpacked_rows + n)];
  }
}

// As `guessed_units` and `hidden_columns`, part by part, with copies of the guessed units that are read from the file.
void Pass::use_units(const ChannelMix& mix, const Product& key, Range range) {
  for (int64_t part = range.begin; part < range.end; part += part_inputs)
    fetched_units(mix, key, {part, std::min(range.end, part + part_inputs)});
}

void Pass::fetched_units(const ChannelMix& mix, Product key, Range part) {
  const int64_t hidden = sizes_.hidden, width = sizes_.width;
  std::int32_t* list = active_ + part.begin;
  const int64_t count = find_active(list, part, [&](int64_t t, int64_t j) { return is_guessed_[t * hidden + j] != 0; });
  model_.lite_counts.units.fetch_add(count, std::memory_order_relaxed);
  model_.lite_counts.of_units.fetch_add(part.end - part.begin, std::memory_order_relaxed);
  for (int64_t t = 0; t < count_; ++t)
    std::fill(hidden_ + t * hidden + part.begin, hidden_ + t * hidden + part.end, 0.0f);

  static thread_local std::vector<std::byte> copies;
  const bool packed = is_packed(mix.key.format);
  const Matrix whole{nullptr, mix.key.format, Order::columns, mix.key.out, part.end - part.begin};
  const auto size = packed ? whole.bytes() : static_cast<std::size_t>(count * 2 * width) * bytes_of(mix.key.format);
  if (copies.size() < size) copies.resize(size);
  fetch_units(mix, list, count, part, copies.data());
  Matrix value = whole;
  value.data = copies.data();
  if (packed) {
    unpacked_units(value, list, count, part.begin, hidden_);
  } else {
    const Matrix rows{copies.data(), mix.key.format, Order::rows, count, width, 2 * width};
    std::vector<float> results(static_cast<std::size_t>(count * count_));
    key.y = results.data();
    key.y_stride = count;
    multiply(rows, key, {0, count});
    for (int64_t t = 0; t < count_; ++t)
      for (int64_t n = 0; n < count; ++n)
        hidden_[t * hidden + list[n]] = results[static_cast<std::size_t>(t * count + n)];
    value = {copies.data() + static_cast<std::size_t>(width) * bytes_of(rows.format), rows.format, Order::columns, width,
             count, 2 * width};
  }
  for (int64_t t = 0; t < count_; ++t) {
    float* units = hidden_ + t * hidden;
    for (int64_t n = 0; n < count; ++n)
      if (!is_guessed_[t * hidden + list[n]]) units[list[n]] = 0;
    relu_squared_.forward[0](units, units, part.begin, part.end);
  }
  fetched_columns(mix, list, count, part, value);
}

// Units one after the other, or, packed, at their places in the groups of the part.
void Pass::fetch_units(
    const ChannelMix& mix, const std::int32_t* list, int64_t count, Range part, std::byte* to) const {
  const auto* from = static_cast<const std::byte*>(mix.key.data);
  const ModelFile& file = *model_.file_;
  if (!is_packed(mix.key.format)) {
    const auto size = static_cast<std::size_t>(2 * sizes_.width) * bytes_of(mix.key.format);
    for (int64_t n = 0; n < count; ++n)
      file.fetch(from + static_cast<std::size_t>(list[n]) * size, size, to + static_cast<std::size_t>(n) * size);
    return;
  }
  const Packing how = packing(mix.key.format);
  const int64_t group_bytes = how.group_bytes(mix.key.out), scales = how.column_scales(mix.key.out) * 2;
  const int64_t row = how.lines(mix.key.out) * Packing::line;
  const int64_t first = part.begin / how.group;
  for (int64_t g = first; g < how.groups(part.end); ++g)
    file.fetch(from + g * group_bytes, static_cast<std::size_t>(scales), to + (g - first) * group_bytes);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t g = list[n] / how.group, at = scales + list[n] % how.group * row;
    file.fetch(from + g * group_bytes + at, static_cast<std::size_t>(row), to + (g - first) * group_bytes + at);
  }
}

// What the part's units give, without the columns of those that are zero for every token.
void Pass::fetched_columns(
    const ChannelMix& mix, const std::int32_t* list, int64_t count, Range part, const Matrix& value) {
  const int64_t hidden = sizes_.hidden, width = sizes_.width, number = part.begin / part_inputs;
  std::vector<std::int32_t> active;
  std::vector<float> compact, rounded;
  Product product = dense(nullptr, hidden, partial_ - mix.value_from + number * count_ * width, width);
  if (is_packed(value.format)) {
    const Packing how = packing(value.format);
    const Integers all(hidden_prepared_, count_, hidden, how.group);
    product_.quantise(hidden_, hidden, part.begin, part.end, 0, count_, all);
    // those of the part alone, from token to token in rows of their own
    const int64_t groups = how.groups(value.in), stride = groups * how.group;
    compact.resize(static_cast<std::size_t>(Integers::floats(count_, stride, how.group) + 16));
    auto* memory = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(compact.data()) + 63) / 64 * 64);
    product.integers = Integers(memory, count_, stride, how.group);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * all.groups() + part.begin / how.group;
      std::copy_n(all.values + t * all.stride + part.begin, stride, product.integers.values + t * stride);
      std::copy_n(all.scales + at, groups, product.integers.scales + t * groups);
      std::copy_n(all.balance + at, groups, product.integers.balance + t * groups);
    }
    for (int64_t n = 0; n < count; ++n) {
      const std::int32_t j = list[n] - static_cast<std::int32_t>(part.begin);
      bool is_used = false;
      for (int64_t t = 0; t < count_; ++t) is_used |= product.integers.values[t * stride + j] != 0;
      if (is_used) active.push_back(j);
    }
  } else {
    compact.resize(static_cast<std::size_t>(count_ * count));
    for (int64_t n = 0; n < count; ++n) {
      bool is_used = false;
      for (int64_t t = 0; t < count_; ++t) {
        const float unit = hidden_[t * hidden + list[n]];
        compact[static_cast<std::size_t>(t * count + n)] = unit;
        is_used |= unit != 0;
      }
      if (is_used) active.push_back(static_cast<std::int32_t>(n));
    }
    product.x = compact.data();
    product.x_stride = count;
    if (is_prepared(product_, value)) {
      rounded.resize(static_cast<std::size_t>(prepared_floats(count_, count)));
      prepare(product_, value, product, rounded.data());
      fill(product_, product, 0, count, 0, count_);
    }
  }
  static const std::int32_t nothing = 0;
  product.active = active.empty() ? &nothing : active.data();
  product.active_count = static_cast<int64_t>(active.size());
  product.part_stride = count_ * width;
  product.part_end = 1;
  multiply(value, product, {mix.value_from, mix.value_from + width});
  model_.ffn_reads.fetch_add(product.active_count, std::memory_order_relaxed);
  model_.ffn_columns.fetch_add(part.end - part.begin, std::memory_order_relaxed);
}

// Exact logits of a cluster's tokens, of weights that are read from the file.
void Pass::exact_logits(std::int32_t cluster, const Product& product) const {
  const Matrix& head = model_.head_;
  const auto& starts = model_.clusters_.starts;
  const int64_t unit = is_packed(head.format) ? Packing::panel : 1;
  const int64_t begin = starts[static_cast<std::size_t>(cluster)], end = starts[static_cast<std::size_t>(cluster) + 1];
  const int64_t first = begin / unit * unit, last = std::min((end + unit - 1) / unit * unit, head.out);
  Matrix some = head;
  some.out = last - first;
  Matrix before = head;
  before.out = first;
  static thread_local std::vector<std::byte> copies;
  if (copies.size() < some.bytes()) copies.resize(some.bytes());
  model_.file_->fetch(static_cast<const std::byte*>(head.data) + before.bytes(), some.bytes(), copies.data());
  some.data = copies.data();
  Product moved = product;
  moved.y += first;
  multiply(some, moved, {begin - first, end - first});
}

// Logits of one row: exact for tokens of the likeliest clusters; those of every other cluster share its guessed
// probability equally (2412.10856, section on the hierarchical head; log-sum-exp in float64).
void Pass::head_by_clusters(int64_t row) {
  const Clusters& clusters = model_.clusters_;
  const int64_t width = sizes_.width, count = clusters.count();
  const float* x = y_ + row * width;
  const auto one = [&](const Matrix& matrix, float* y) {
    Product product{x, width, y, 0, 1};
    return prepared(matrix, product);
  };
  const Product guess = one(clusters.first, guessed_clusters_);
  shared_out(count, 16, clusters.first.bytes_of_output(), [&](Range range) { multiply(clusters.first, guess, range); });

  std::vector<double> log_p(guessed_clusters_, guessed_clusters_ + count), p(log_p.size());
  const double highest = *std::max_element(log_p.begin(), log_p.end());
  double total = 0;
  for (const double each : log_p) total += std::exp(each - highest);
  for (double& each : log_p) each -= highest + std::log(total);
  std::transform(log_p.begin(), log_p.end(), p.begin(), [](double x) { return std::exp(x); });
  std::vector<std::int32_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
    return p[static_cast<std::size_t>(a)] > p[static_cast<std::size_t>(b)];
  });
  int64_t chosen = 0;
  double mass = 0;
  while (chosen < std::min(clusters.most, count) && (mass < clusters.mass || chosen < clusters.fewest))
    mass += p[static_cast<std::size_t>(order[static_cast<std::size_t>(chosen++)])];

  const auto rows_of = [&](std::int32_t cluster) {
    const auto at = static_cast<std::size_t>(cluster);
    return Range{clusters.starts[at], clusters.starts[at + 1]};
  };
  int64_t rows = 0;
  for (int64_t i = 0; i < chosen; ++i) {
    const Range range = rows_of(order[static_cast<std::size_t>(i)]);
    rows += range.end - range.begin;
  }
  const Product exact = one(model_.head_, sorted_logits_);
  if (model_.file_)
    parallel_for(static_cast<int>(chosen), threads_, [&](int i) {
      exact_logits(order[static_cast<std::size_t>(i)], exact);
    });
  else
    shared_out(rows, 16, model_.head_.bytes_of_output(), [&](Range part) {
    int64_t first = 0;
    for (int64_t i = 0; i < chosen; ++i) {
      const Range range = rows_of(order[static_cast<std::size_t>(i)]);
      const int64_t size = range.end - range.begin;
      const int64_t begin = std::max(part.begin - first, int64_t{0}), end = std::min(part.end - first, size);
      if (begin < end) multiply(model_.head_, exact, {range.begin + begin, range.begin + end});
      first += size;
    }
  });
  model_.lite_counts.rows.fetch_add(rows, std::memory_order_relaxed);
  model_.lite_counts.clusters.fetch_add(chosen, std::memory_order_relaxed);
  model_.lite_counts.heads.fetch_add(1, std::memory_order_relaxed);

  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  const auto each_chosen = [&](auto&& work) {
    for (int64_t i = 0; i < chosen; ++i) {
      const Range range = rows_of(order[static_cast<std::size_t>(i)]);
      for (int64_t r = range.begin; r < range.end; ++r) work(r);
    }
  };
  each_chosen([&](int64_t r) { largest = std::max(largest, double{sorted_logits_[r]}); });
  each_chosen([&](int64_t r) { sum += std::exp(sorted_logits_[r] - largest); });
  float* logits = logits_ + row * sizes_.vocab;
  each_chosen([&](int64_t r) { logits[clusters.order[static_cast<std::size_t>(r)]] = sorted_logits_[r]; });
  const double scale = largest + std::log(sum) - std::log(mass);
  for (int64_t i = chosen; i < count; ++i) {
    const std::int32_t cluster = order[static_cast<std::size_t>(i)];
    const Range range = rows_of(cluster);
    const auto size = static_cast<double>(range.end - range.begin);
    const double share = log_p[static_cast<std::size_t>(cluster)] - std::log(size);
    for (int64_t r = range.begin; r < range.end; ++r)
      logits[clusters.order[static_cast<std::size_t>(r)]] = static_cast<float>(scale + share);
  }
}

}  // namespace rookery
