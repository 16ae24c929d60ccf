#include "kernels/elementwise.hpp"

#include "kernels/cross_entropy.hpp"
#include "kernels/reading.hpp"
#include "kernels/relu_squared.hpp"
#include "kernels/token_shift.hpp"
#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

// Calls kernel(x, y, z) on vectors of every length up to 70 and compares x with expected(x, y, z), element by element.
template <class Kernel, class Expected>
void each_length(const char* what, Kernel&& kernel, Expected&& expected) {
  Random random(2);
  for (int64_t count = 1; count <= 70; ++count) {
    Floats x = random.normals(count, 2);
    const Floats given = x, y = random.normals(count), z = random.normals(count, 5);
    kernel(x.data(), y.data(), z.data(), count);
    for (std::size_t j = 0; j < x.size(); ++j) {
      const double want = expected(given[j], y[j], z[j]);
      expect(std::abs(x[j] - want) < 2e-6 * (1 + std::abs(want)), what, count, x[j], want);
    }
  }
}

TEST(functions_of_vectors_are_what_they_say) {
  for (const Isa isa : available_isas()) {
    const ElementwiseKernels& k = elementwise_kernels(isa);
    const auto in_place = [&](const char* what, auto function, auto expected) {
      each_length(what, [&](float* x, const float*, const float*, int64_t n) { function(x, n); },
                  [&](double x, double, double) { return expected(x); });
    };
    in_place("tanh", k.hyperbolic_tangent, [](double x) { return std::tanh(x); });
    in_place("logistic", k.logistic, [](double x) { return logistic(x); });
    in_place("exp", k.exponential, [](double x) { return std::exp(x); });
    in_place("decay", k.decay, [](double x) { return std::exp(-std::exp(x)); });
    each_length("approach", k.approach, [](double x, double y, double z) { return x + (y - x) * logistic(z); });
    each_length("add_gated", k.add_gated, [](double x, double y, double z) { return x + y * logistic(z); });
    const auto by_gate = [](auto function) {
      return [function](float* x, const float*, const float* z, int64_t n) { function(x, z, n); };
    };
    each_length("times_logistic", by_gate(k.times_logistic),
                [](double x, double, double z) { return x * logistic(z); });
    each_length("times_silu", by_gate(k.times_silu), [](double x, double, double z) { return x * z * logistic(z); });
    each_length("interpolate",
                [&](float* x, const float* y, const float* z, int64_t n) { k.interpolate(y, z, y, x, n); },
                [](double x, double y, double z) { return y + (z - y) * (y + x); });
  }
}

TEST(decays_beyond_what_float32_holds_are_zero_and_one) {
  for (const Isa isa : available_isas()) {
    Floats x{-200, -90, 5, 90, 200};
    elementwise_kernels(isa).decay(x.data(), 5);
    expect(x == Floats{1, 1, 0, 0, 0}, name(isa), x[0], x[1], x[2], x[3], x[4]);
  }
}

TEST(layer_norms_have_the_mean_and_variance_of_their_weights) {
  Random random(3);
  for (const Isa isa : available_isas())
    for (const int64_t n : {2, 8, 33, 64, 100}) {
      Floats x = random.normals(n, 3), out(x.size());
      for (float& v : x) v += 5;
      const Floats weight = random.normals(n), bias = random.normals(n);
      elementwise_kernels(isa).layer_norm(x.data(), weight.data(), bias.data(), 1e-5f, out.data(), n);
      double mean = 0, variance = 0;
      for (const float v : x) mean += v / static_cast<double>(n);
      for (const float v : x) variance += (v - mean) * (v - mean) / static_cast<double>(n);
      for (std::size_t j = 0; j < x.size(); ++j) {
        const double want = (x[j] - mean) / std::sqrt(variance + 1e-5) * weight[j] + bias[j];
        expect(std::abs(out[j] - want) < 1e-5, name(isa), n, out[j], want);
      }
    }
}

TEST(formats_are_widened_exactly) {
  Random random(4);
  for (const Isa isa : available_isas())
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16})
      for (const int64_t n : {1, 7, 16, 45}) {
        const Stored x = stored(random, n, format);
        Floats out(static_cast<std::size_t>(n));
        elementwise_kernels(isa).widen[static_cast<int>(format)](x.data(), out.data(), n);
        expect(same(out, x.values), name(isa), static_cast<int>(format), n);
      }
}

TEST(tokens_are_mixed_with_the_one_before_in_their_document) {
  Random random(5);
  constexpr int64_t channels = 37, mixes = 3;
  const std::vector<int64_t> starts{0, 4, 4, 9};
  const Floats x = random.normals(9 * channels), previous = random.normals(3 * channels);
  const Floats mix = random.normals(mixes * channels);
  for (const Isa isa : available_isas()) {
    Floats out(static_cast<std::size_t>(mixes * 9 * channels));
    const TokenShift shift{9, channels, mixes, starts.data(), x.data(), previous.data(), mix.data()};
    token_shift_kernels(isa).forward[0](shift, out.data(), 0, 5);
    token_shift_kernels(isa).forward[0](shift, out.data(), 5, 9);
    for (int64_t m = 0; m < mixes; ++m)
      for (int64_t t = 0; t < 9; ++t)
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t document = t < 4 ? 0 : 2;
          const bool is_first = t == starts[static_cast<std::size_t>(document)];
          const auto at = static_cast<std::size_t>(t * channels + c);
          const double before = is_first ? previous[static_cast<std::size_t>(document * channels + c)]
                                         : x[at - static_cast<std::size_t>(channels)];
          const double want = x[at] + (before - x[at]) * mix[static_cast<std::size_t>(m * channels + c)];
          const double got = out[static_cast<std::size_t>((m * 9 + t) * channels + c)];
          expect(std::abs(got - want) < 1e-5, name(isa), m, t, c, got, want);
        }
  }
}

TEST(positive_numbers_are_squared_and_the_rest_is_zero) {
  for (const Isa isa : available_isas())
    each_length("relu squared",
                [&](float* x, const float*, const float*, int64_t n) {
                  relu_squared_kernels(isa).forward[0](x, x, 0, n / 2);
                  relu_squared_kernels(isa).forward[0](x, x, n / 2, n);
                },
                [](double x, double, double) { return x > 0 ? x * x : 0; });
}

TEST(losses_are_those_of_the_softmax_and_their_gradients_add_up_to_zero) {
  Random random(6);
  constexpr int64_t vocabulary = 61, rows = 5;
  const std::vector<int64_t> targets{3, 60, -100, 0, 17};
  const Floats given = random.normals(rows * vocabulary, 4);
  for (const Isa isa : available_isas()) {
    Floats logits = given, losses(rows);
    const CrossEntropy call{vocabulary, -100, logits.data(), targets.data(), losses.data(), 0.5f, 0};
    cross_entropy_kernels(isa).gradient[0](call, 0, rows);
    for (std::size_t row = 0; row < rows; ++row) {
      const float* x = given.data() + row * vocabulary;
      double sum = 0, total = 0;
      for (int64_t j = 0; j < vocabulary; ++j) sum += std::exp(double{x[j]});
      for (int64_t j = 0; j < vocabulary; ++j) total += logits[row * vocabulary + static_cast<std::size_t>(j)];
      const double want = targets[row] < 0 ? 0 : std::log(sum) - x[targets[row]];
      expect(std::abs(losses[row] - want) < 1e-5, name(isa), row, losses[row], want);
      expect(std::abs(total) < 1e-6, name(isa), row, total);
    }
  }
}

TEST(memory_is_read_as_a_whole) {
  Random random(7);
  const Floats x = random.normals(1024);
  std::uint32_t want = 0;
  for (const float v : x) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof bits);
    want ^= bits;
  }
  for (const Isa isa : available_isas())
    expect(reading_kernels(isa).read(x.data(), 4096) == want, name(isa));
}

}  // namespace
}  // namespace rookery::tests
