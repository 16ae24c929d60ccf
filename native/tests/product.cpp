#include "kernels/prepared.hpp"

#include <cstring>
#include <vector>

#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;

struct Case {
  int64_t out, in;
};
constexpr Case cases[] = {{1, 1}, {5, 3}, {33, 40}, {77, 201}, {64, 128}, {16, 300}, {130, 264}};
constexpr int64_t most_tokens = 40;

// Weight of input i in output o.
float at(const Stored& w, const Case& c, Order order, int64_t o, int64_t i) {
  return w.values[static_cast<std::size_t>(order == Order::rows ? o * c.in + i : i * c.out + o)];
}

// One way to multiply: an instruction set, a format, and whether inputs are rounded to bfloat16 first.
struct Way {
  Isa isa;
  Format format;
  bool rounds;
};

std::vector<Way> ways() {
  std::vector<Way> all;
  for (const Isa isa : every_isa()) {
    for (const Format format : {Format::float32, Format::bfloat16, Format::float16}) all.push_back({isa, format, false});
    if (product_kernels(isa).round) all.push_back({isa, Format::bfloat16, true});
  }
  return all;
}

Floats run(
    const Way& way, const Matrix& matrix, const Floats& x, int64_t first, int64_t tokens, int64_t cut,
    const std::vector<std::int32_t>* active = nullptr) {
  const ProductKernels& kernels = product_kernels(way.isa);
  Floats y(static_cast<std::size_t>(tokens * matrix.out));
  Product product{x.data() + first * matrix.in, matrix.in, y.data(), matrix.out, tokens};
  Floats memory(static_cast<std::size_t>(prepared_floats(tokens, matrix.in)));
  if (way.rounds) {
    prepare(kernels, matrix, product, memory.data());
    fill(kernels, product, 0, matrix.in, 0, tokens);
  }
  if (active) {
    product.active = active->data();
    product.active_count = static_cast<int64_t>(active->size());
  }
  const auto kernel = kernels.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)];
  kernel(matrix, product, 0, cut);
  if (cut < matrix.out) kernel(matrix, product, cut, matrix.out);
  return y;
}

// To the nearest bfloat16, ties to even.
float nearest(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void check(const Way& way, Order order, const Case& c, Random& random) {
  const Stored w = stored(random, c.out * c.in, way.format);
  const Matrix matrix{w.data(), way.format, order, c.out, c.in};
  const Floats x = random.normals(most_tokens * c.in);
  const Floats whole = run(way, matrix, x, 0, most_tokens, c.out);
  for (int64_t t = 0; t < most_tokens; ++t)
    for (int64_t o = 0; o < c.out; ++o) {
      double expected = 0, size = 1e-30;
      for (int64_t i = 0; i < c.in; ++i) {
        const float input = x[static_cast<std::size_t>(t * c.in + i)];
        const double term = double{at(w, c, order, o, i)} * double{way.rounds ? nearest(input) : input};
        expected += term;
        size += std::abs(term);
      }
      const double off = std::abs(whole[static_cast<std::size_t>(t * c.out + o)] - expected) / size;
      expect(off < 2e-6, name(way.isa), static_cast<int>(way.format), static_cast<int>(order), c.out, c.in, "off by", off);
    }
  for (const int64_t tokens : {1, 2, 5, 8, 17}) {
    const Floats some = run(way, matrix, x, 3, tokens, std::min<int64_t>(c.out, 16));
    const Floats same_tokens(whole.begin() + 3 * c.out, whole.begin() + (3 + tokens) * c.out);
    expect(same(some, same_tokens), name(way.isa), c.out, c.in, tokens, "tokens alone are not those among others");
  }
}

// Skipping inputs that are zero for every token changes no bit, and neither do very small ones.
void check_active(const Way& way, const Case& c, Random& random) {
  const Stored w = stored(random, c.out * c.in, way.format);
  const Matrix matrix{w.data(), way.format, Order::columns, c.out, c.in};
  constexpr int64_t tokens = 2;
  Floats x = random.normals(most_tokens * c.in);
  std::vector<std::int32_t> active;
  for (int64_t i = 0; i < c.in; ++i) {
    const bool is_active = random.below(2);
    if (is_active) active.push_back(static_cast<std::int32_t>(i));
    for (int64_t t = 0; t < tokens; ++t)
      if (float& number = x[static_cast<std::size_t>(t * c.in + i)]; !is_active)
        number = 0;
      else if (i % 5 == 4)
        number *= 1e-38f;
  }
  const Floats some = run(way, matrix, x, 0, tokens, c.out, &active), all = run(way, matrix, x, 0, tokens, c.out);
  expect(same(some, all), name(way.isa), c.out, c.in, "skipping zeros changes the result");
  const Floats among = run(way, matrix, x, 0, most_tokens, c.out);
  expect(same(some, Floats(among.begin(), among.begin() + tokens * c.out)), name(way.isa), c.out, c.in,
         "skipping zeros gives another result than many tokens");
}

TEST(products_are_sums_that_do_not_depend_on_the_tokens_beside_them) {
  Random random(1);
  for (const Way& way : ways())
    for (const Case& c : cases) {
      for (const Order order : {Order::rows, Order::columns}) check(way, order, c, random);
      check_active(way, c, random);
    }
}

}  // namespace
}  // namespace rookery::tests
