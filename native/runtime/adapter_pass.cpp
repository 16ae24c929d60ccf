// What adapters add to the products of a pass. A token's sums are made in one order whoever else is in the call.
#include <array>

#include "runtime/pass.hpp"

namespace rookery {

using std::int64_t;

namespace {

// `product` for some of its tokens.
Product of_tokens(const Product& product, Range tokens) {
  return {product.x + tokens.begin * product.x_stride, product.x_stride, product.y + tokens.begin * product.y_stride,
          product.y_stride, tokens.end - tokens.begin};
}

}  // namespace

void Pass::first_factors(std::span<const Job> jobs, std::span<const Adapted> adapted) const {
  if (adapted.empty()) return;
  struct Low {
    const Matrix* matrix;
    Product product;
  };
  std::vector<Low> lows;
  int64_t total = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i)
    for (const Adapted& some : adapted) {
      const LowRankChange* change = some.adapter->of(*jobs[i].matrix);
      if (!change) continue;
      Product low = jobs[i].product;
      low.y = adapter_factors_ + static_cast<int64_t>(i) * count_ * adapter_rank_;
      low.y_stride = adapter_rank_;
      lows.push_back({&change->first, of_tokens(low, some.tokens)});
      total += change->first.out;
    }
  if (lows.empty()) return;
  shared_out(total, 4, lows[0].matrix->bytes_of_output(), [&](Range range) {
    int64_t first = 0;
    for (const Low& low : lows) {
      const Range part{std::max(range.begin - first, int64_t{0}), std::min(range.end - first, low.matrix->out)};
      first += low.matrix->out;
      if (!part.empty()) multiply(*low.matrix, low.product, part);
    }
  });
}

void Pass::add_second_factors(
    const Matrix& matrix, const Product& product, int64_t slot, std::span<const Adapted> adapted,
    Range outputs) const {
  for (const Adapted& some : adapted) {
    const LowRankChange* change = some.adapter->of(matrix);
    if (!change) continue;
    Product part = product;
    part.x = adapter_factors_ + slot * count_ * adapter_rank_;
    part.x_stride = adapter_rank_;
    part = of_tokens(part, some.tokens);
    part.add = true;
    multiply(change->second, part, outputs);
  }
}

void Pass::add_change(const Matrix& matrix, const Product& product) const {
  if (adapted_.empty()) return;
  first_factors(std::array{Job{&matrix, product, nullptr}}, adapted_);
  shared_out(matrix.out, 16, adapter_rank_ * static_cast<int64_t>(sizeof(float)), [&](Range range) {
    add_second_factors(matrix, product, 0, adapted_, range);
  });
}

// The same tokens as `adapted_`, numbered as those whose logits are wanted.
std::vector<Adapted> Pass::wanted_adapted() const {
  std::vector<Adapted> found;
  const auto place = [&](int64_t token) {
    return std::lower_bound(wanted_.begin(), wanted_.end(), first_ + token) - wanted_.begin();
  };
  for (const Adapted& some : adapted_) {
    const Range tokens{place(some.tokens.begin), place(some.tokens.end)};
    if (!tokens.empty()) found.push_back({some.adapter, tokens});
  }
  return found;
}

}  // namespace rookery
