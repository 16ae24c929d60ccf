// Recurrences against their equations in double, gradients against differences of these.
#include "kernels/wkv4.hpp"
#include "kernels/wkv6.hpp"
#include "kernels/wkv7.hpp"
#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;
using Doubles = std::vector<double>;

constexpr int64_t tokens = 35;  // more than one chunk, and no whole number of them

Floats narrowed(const Doubles& x) { return Floats(x.begin(), x.end()); }

Doubles some(Random& random, int64_t count, float scale = 1) {
  const Floats x = random.normals(count, scale);
  return Doubles(x.begin(), x.end());
}

double dot(const Doubles& a, const Floats& b) {
  double total = 0;
  for (std::size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

// One sequence's inputs by place, its outputs and last state; `run` writes these two.
struct Sequence {
  std::vector<Doubles> inputs;
  Doubles y, state;  // `state` holds the first one before, the last one after `run`
};

// Gradients of Σ y · grad_y + Σ state · grad_state by the inputs, against differences along random directions.
template <class Run>
void check_gradients(const char* what, const Sequence& given, const Floats& grad_y, const Floats& grad_state,
                     const std::vector<Floats>& gradients, Run&& run) {
  Random random(11);
  for (std::size_t i = 0; i < given.inputs.size(); ++i) {
    const Doubles direction = some(random, static_cast<int64_t>(given.inputs[i].size()));
    double value[2];
    constexpr double step = 1e-5;
    for (const int side : {0, 1}) {
      Sequence moved = given;
      for (std::size_t j = 0; j < direction.size(); ++j) moved.inputs[i][j] += (side ? step : -step) * direction[j];
      run(moved);
      value[side] = dot(moved.y, grad_y) + dot(moved.state, grad_state);
    }
    const double want = (value[1] - value[0]) / (2 * step), got = dot(direction, gradients[i]);
    expect(std::abs(got - want) < 1e-3 * (1 + std::abs(want)), what, "gradient of input", i, got, want);
  }
}

// RWKV-4: inputs log_w, u [channels], k, v [tokens, channels]; the state is [3, channels], its exponent 0.
void run4(Sequence& s) {
  const auto channels = static_cast<int64_t>(s.inputs[0].size());
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < channels; ++c) {
      const auto at = static_cast<std::size_t>(t * channels + c), j = static_cast<std::size_t>(c);
      double &weighted = s.state[j], &total = s.state[static_cast<std::size_t>(channels + c)];
      const double k = s.inputs[2][at], v = s.inputs[3][at], own = std::exp(s.inputs[1][j] + k);
      s.y[at] = (weighted + own * v) / (total + own);
      weighted = std::exp(s.inputs[0][j]) * weighted + std::exp(k) * v;
      total = std::exp(s.inputs[0][j]) * total + std::exp(k);
    }
}

// The sums themselves, not as multiples of e^top; its exponent is then 0.
Doubles plain_sums(const Floats& state, int64_t channels) {
  Doubles sums(state.size());
  for (int64_t i = 0; i < 2 * channels; ++i) {
    const auto at = static_cast<std::size_t>(i);
    sums[at] = state[at] * std::exp(double{state[static_cast<std::size_t>(2 * channels + i % channels)]});
  }
  return sums;
}

TEST(rwkv4_averages_as_its_equation_says) {
  Random random(12);
  for (const int64_t channels : {5, 40, 200}) {
    Sequence given{{some(random, channels), some(random, channels), some(random, tokens * channels),
                    some(random, tokens * channels)},
                   Doubles(static_cast<std::size_t>(tokens * channels)), some(random, 3 * channels)};
    for (double& w : given.inputs[0]) w = -std::exp(w - 2);
    for (int64_t c = 0; c < channels; ++c) {
      double& total = given.state[static_cast<std::size_t>(channels + c)];
      total = 1 + std::abs(total);
      given.state[static_cast<std::size_t>(2 * channels + c)] = 0;
    }
    Sequence want = given;
    run4(want);
    const Floats log_w = narrowed(given.inputs[0]), u = narrowed(given.inputs[1]), first = narrowed(given.state);
    Floats k = narrowed(given.inputs[2]), v = narrowed(given.inputs[3]);
    for (const Isa isa : available_isas()) {
      const Wkv4Kernels& kernels = wkv4_kernels(isa);
      Floats y(k.size()), state = first;
      const int64_t cut = std::min<int64_t>(16, channels);
      const Wkv4Piece piece{tokens, channels, log_w.data(), u.data(), k.data(), v.data(), y.data()};
      kernels.advance(piece, state.data(), 0, cut);
      kernels.advance(piece, state.data(), cut, channels);
      expect(apart(y, want.y) < 2e-5, name(isa), channels, "advance", apart(y, want.y));
      expect(apart(plain_sums(state, channels), want.state) < 1e-3, name(isa), channels, "state after advance");

      const std::vector<int64_t> starts{0, tokens}, chunks{0};
      const Wkv4Shape shape{1, channels, starts.data(), chunks.data()};
      Floats last(state.size()), checkpoints(static_cast<std::size_t>(2 * 3 * channels)), out(k.size());
      const Wkv4Inputs in{log_w.data(), u.data(), {k.data()}, {v.data()}, first.data()};
      for (int64_t c = 0; c < channels; c += wkv4_channels)
        kernels.forward(shape, in, {{out.data()}, last.data(), checkpoints.data()}, 0, c);
      expect(apart(out, want.y) < 2e-5, name(isa), channels, "forward", apart(out, want.y));

      Floats grad_y = random.normals(tokens * channels), none(static_cast<std::size_t>(3 * channels));
      std::vector<Floats> grads{Floats(log_w.size()), Floats(u.size()), Floats(k.size()), Floats(v.size())};
      Floats initial(none.size());
      const Wkv4Grads given_back{{grad_y.data()}, nullptr, grads[0].data(), grads[1].data(), {grads[2].data()},
                                 {grads[3].data()}, initial.data()};
      for (int64_t c = 0; c < channels; c += wkv4_channels)
        kernels.backward(shape, in, checkpoints.data(), given_back, 0, c);
      check_gradients("rwkv4", given, grad_y, none, grads, run4);
    }
  }
}

// RWKV-5 and 6, one head: inputs r, log_w, k [tokens, key], v [tokens, value], u [key]; the state is [value, key].
void run6(Sequence& s) {
  const auto key = static_cast<int64_t>(s.inputs[4].size()), value = static_cast<int64_t>(s.state.size()) / key;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = 0; i < value; ++i) {
      const double v = s.inputs[3][static_cast<std::size_t>(t * value + i)];
      double y = 0;
      for (int64_t j = 0; j < key; ++j) {
        const auto at = static_cast<std::size_t>(t * key + j);
        double& state = s.state[static_cast<std::size_t>(i * key + j)];
        const double written = s.inputs[2][at] * v;
        y += s.inputs[0][at] * (state + s.inputs[4][static_cast<std::size_t>(j)] * written);
        state = state * std::exp(s.inputs[1][at]) + written;
      }
      s.y[static_cast<std::size_t>(t * value + i)] = y;
    }
}

Floats turned(const Floats& x, int64_t rows, int64_t columns) {
  Floats y(x.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      y[static_cast<std::size_t>(j * rows + i)] = x[static_cast<std::size_t>(i * columns + j)];
  return y;
}

Sequence some6(Random& random, int64_t n) {
  const int64_t count = tokens * n;
  Sequence s{{some(random, count), some(random, count), some(random, count), some(random, count), some(random, n)},
             Doubles(static_cast<std::size_t>(count)), some(random, n * n)};
  for (double& w : s.inputs[1]) w = -std::exp(w - 1);
  return s;
}

void check6(Isa isa, int64_t n, const Sequence& given, const Sequence& want, Random& random) {
  const Wkv6Kernels& kernels = wkv6_kernels(isa);
  std::vector<Floats> x;
  for (const Doubles& input : given.inputs) x.push_back(narrowed(input));
  const double scale = std::sqrt(static_cast<double>(n * tokens));
  const std::vector<int64_t> starts{0, tokens}, chunks{0};
  const HeadShape shape{1, 1, n, n, starts.data(), chunks.data()};
  const Floats first = narrowed(given.state);
  Floats out(x[3].size()), last(first.size()), checkpoints(static_cast<std::size_t>(3 * n * n));
  const Wkv6Inputs in{{x[0].data()}, {x[1].data()}, {x[2].data()}, {x[3].data()}, false, x[4].data(), first.data()};
  kernels.forward(shape, in, {{out.data()}, last.data(), checkpoints.data()}, 0, 0);
  expect(apart(out, want.y, scale) < 1e-5, name(isa), n, "forward");
  expect(apart(last, want.state, scale) < 1e-5, name(isa), n, "state after forward");

  Floats grad_y = random.normals(tokens * n), grad_state = random.normals(n * n), initial(first.size());
  std::vector<Floats> grads;
  for (const Floats& input : x) grads.emplace_back(input.size());
  const Wkv6Grads back{{grad_y.data()},   grad_state.data(), {grads[0].data()}, {grads[1].data()}, {grads[2].data()},
                       {grads[3].data()}, nullptr,           grads[4].data(),   initial.data()};
  kernels.backward(shape, in, checkpoints.data(), back, 0, 0);
  check_gradients("rwkv6", given, grad_y, grad_state, grads, run6);
}

TEST(rwkv5_and_6_move_their_matrix_as_their_equation_says) {
  Random random(13);
  for (const int64_t n : {3, 8, 16, 40, 64}) {
    const Sequence given = some6(random, n);
    Sequence want = given;
    run6(want);
    for (const Isa isa : available_isas()) {
      std::vector<Floats> x;
      for (const Doubles& input : given.inputs) x.push_back(narrowed(input));
      for (float& w : x[1]) w = std::exp(w);
      Floats y(x[3].size()), state = turned(narrowed(given.state), n, n);
      const Wkv6Piece piece{tokens,      n, n, n, x[0].data(), x[2].data(), x[3].data(),
                            x[1].data(), n, x[4].data(), y.data()};
      wkv6_kernels(isa).advance(piece, state.data());
      const double scale = std::sqrt(static_cast<double>(n * tokens));
      expect(apart(y, want.y, scale) < 1e-5, name(isa), n, "advance", apart(y, want.y, scale));
      expect(apart(turned(state, n, n), want.state, scale) < 1e-5, name(isa), n, "state after advance");
      if (n % 16 == 0) check6(isa, n, given, want, random);
    }
  }
}

// RWKV-7, one head: inputs r, log_w, k, v, a, b [tokens, n]; the state is [value, key].
void run7(Sequence& s) {
  const auto n = static_cast<int64_t>(s.inputs[0].size()) / tokens;
  for (int64_t t = 0; t < tokens; ++t) {
    const auto input = [&](std::size_t i, int64_t j) { return s.inputs[i][static_cast<std::size_t>(t * n + j)]; };
    for (int64_t i = 0; i < n; ++i) {
      double* row = s.state.data() + i * n;
      double removed = 0, y = 0;
      for (int64_t j = 0; j < n; ++j) removed += row[j] * input(4, j);
      for (int64_t j = 0; j < n; ++j) {
        row[j] = row[j] * std::exp(input(1, j)) + removed * input(5, j) + input(3, i) * input(2, j);
        y += row[j] * input(0, j);
      }
      s.y[static_cast<std::size_t>(t * n + i)] = y;
    }
  }
}

Sequence some7(Random& random, int64_t n) {
  const int64_t count = tokens * n;
  Sequence s{{}, Doubles(static_cast<std::size_t>(count)), some(random, n * n)};
  for (int i = 0; i < 6; ++i) s.inputs.push_back(some(random, count));
  for (double& w : s.inputs[1]) w = -0.6 / (1 + std::exp(w));
  // −κ and κ ⊙ rate, κ of length one
  for (int64_t t = 0; t < tokens; ++t) {
    double square = 0;
    for (int64_t j = 0; j < n; ++j) square += std::pow(s.inputs[4][static_cast<std::size_t>(t * n + j)], 2);
    for (int64_t j = 0; j < n; ++j) {
      const auto at = static_cast<std::size_t>(t * n + j);
      s.inputs[4][at] /= -std::sqrt(square);
      s.inputs[5][at] = -s.inputs[4][at] / (1 + std::exp(s.inputs[5][at]));
    }
  }
  return s;
}

void check7(Isa isa, int64_t n, const Sequence& given, const Sequence& want, Random& random) {
  const Wkv7Kernels& kernels = wkv7_kernels(isa);
  std::vector<Floats> x;
  for (const Doubles& input : given.inputs) x.push_back(narrowed(input));
  const double scale = std::sqrt(static_cast<double>(n * tokens));
  const std::vector<int64_t> starts{0, tokens}, chunks{0};
  const Wkv7Shape shape{1, 1, n, n, starts.data(), chunks.data()};
  const Floats first = narrowed(given.state);
  Floats out(x[3].size()), last(first.size()), checkpoints(static_cast<std::size_t>(2 * n * n)), removed(x[3].size());
  const Wkv7Inputs in{{x[0].data()}, {x[1].data()}, {x[2].data()}, {x[3].data()}, {x[4].data()}, {x[5].data()},
                      first.data()};
  const Wkv7Results results{{out.data()}, last.data(), checkpoints.data(), removed.data()};
  kernels.forward(shape, in, results, 0, 0);
  expect(apart(out, want.y, scale) < 1e-5, name(isa), n, "forward");
  expect(apart(last, want.state, scale) < 1e-5, name(isa), n, "state after forward");

  Floats grad_y = random.normals(tokens * n), grad_state = random.normals(n * n), initial(first.size());
  std::vector<Floats> grads;
  for (const Floats& input : x) grads.emplace_back(input.size());
  const Wkv7Grads back{{grad_y.data()},   grad_state.data(), {grads[0].data()}, {grads[1].data()}, {grads[2].data()},
                       {grads[3].data()}, {grads[4].data()}, {grads[5].data()}, initial.data()};
  kernels.backward(shape, in, results, back, 0, 0);
  check_gradients("rwkv7", given, grad_y, grad_state, grads, run7);
}

TEST(rwkv7_moves_its_matrix_as_its_equation_says) {
  Random random(14);
  for (const int64_t n : {16, 48, 64}) {
    const Sequence given = some7(random, n);
    Sequence want = given;
    run7(want);
    for (const Isa isa : available_isas()) {
      std::vector<Floats> x;
      for (const Doubles& input : given.inputs) x.push_back(narrowed(input));
      for (float& w : x[1]) w = std::exp(w);
      x[4].resize(x[4].size() + static_cast<std::size_t>(n));
      Floats y(x[3].size()), state = turned(narrowed(given.state), n, n);
      Wkv7Chunk chunk{tokens, n, n};
      chunk.r = x[0].data();
      chunk.w = x[1].data();
      chunk.k = x[2].data();
      chunk.v = x[3].data();
      chunk.a = x[4].data();
      chunk.b = x[5].data();
      chunk.y = y.data();
      wkv7_kernels(isa).advance(chunk, state.data());
      const double scale = std::sqrt(static_cast<double>(n * tokens));
      expect(apart(y, want.y, scale) < 1e-5, name(isa), n, "advance", apart(y, want.y, scale));
      expect(apart(turned(state, n, n), want.state, scale) < 1e-5, name(isa), n, "state after advance");
      check7(isa, n, given, want, random);
    }
  }
}

}  // namespace
}  // namespace rookery::tests
