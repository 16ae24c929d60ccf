// The steps of compressed models: guessed hidden units, and heads computed cluster by cluster.
#include <cmath>
#include <numeric>

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
void Pass::guessed_units(const ChannelMix& mix, Range range) {
  const int64_t hidden = sizes_.hidden, width = sizes_.width;
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
    unpacked_units(mix, list, count);
  } else {
    Product key = dense(mixed_, width, hidden_, hidden);
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

// Products with some units' key rows, which lie in packed columns.
void Pass::unpacked_units(const ChannelMix& mix, const std::int32_t* list, int64_t count) {
  const int64_t width = sizes_.width;
  std::vector<float> rows(static_cast<std::size_t>(unpacked_rows * width));
  std::vector<float> results(static_cast<std::size_t>(unpacked_rows * count_));
  for (int64_t i = 0; i < count; i += unpacked_rows) {
    const int64_t some = std::min(unpacked_rows, count - i);
    for (int64_t n = 0; n < some; ++n) shadow_.column(mix.key, list[i + n], 0, width, rows.data() + n * width);
    const Matrix unpacked{rows.data(), Format::float32, Order::rows, some, width};
    multiply(unpacked, dense(mixed_, width, results.data(), unpacked_rows), {0, some});
    for (int64_t t = 0; t < count_; ++t)
      for (int64_t n = 0; n < some; ++n)
        hidden_[t * sizes_.hidden + list[i + n]] = results[static_cast<std::size_t>(t * unpacked_rows + n)];
  }
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
    const double share = log_p[static_cast<std::size_t>(cluster)] - std::log(static_cast<double>(range.end - range.begin));
    for (int64_t r = range.begin; r < range.end; ++r)
      logits[clusters.order[static_cast<std::size_t>(r)]] = static_cast<float>(scale + share);
  }
}

}  // namespace rookery
