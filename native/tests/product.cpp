#include "kernels/product.hpp"

#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;

struct Case {
  int64_t out, in;
};
constexpr Case cases[] = {{1, 1}, {5, 3}, {33, 40}, {77, 201}, {64, 128}, {16, 300}};
constexpr Format formats[] = {Format::float32, Format::bfloat16, Format::float16};
constexpr int64_t most_tokens = 40;

// Weight of input i in output o.
float at(const Stored& w, const Case& c, Order order, int64_t o, int64_t i) {
  return w.values[static_cast<std::size_t>(order == Order::rows ? o * c.in + i : i * c.out + o)];
}

Floats run(Isa isa, const Matrix& matrix, const Floats& x, int64_t first, int64_t tokens, int64_t cut) {
  Floats y(static_cast<std::size_t>(tokens * matrix.out));
  const Product product{x.data() + first * matrix.in, matrix.in, y.data(), matrix.out, tokens};
  const auto kernel = product_kernels(isa).run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)];
  kernel(matrix, product, 0, cut);
  if (cut < matrix.out) kernel(matrix, product, cut, matrix.out);
  return y;
}

void check(Isa isa, Format format, Order order, const Case& c, Random& random) {
  const Stored w = stored(random, c.out * c.in, format);
  const Matrix matrix{w.data(), format, order, c.out, c.in};
  const Floats x = random.normals(most_tokens * c.in);
  const Floats whole = run(isa, matrix, x, 0, most_tokens, c.out);
  for (int64_t t = 0; t < most_tokens; ++t)
    for (int64_t o = 0; o < c.out; ++o) {
      double expected = 0, size = 1e-30;
      for (int64_t i = 0; i < c.in; ++i) {
        const double term = double{at(w, c, order, o, i)} * double{x[static_cast<std::size_t>(t * c.in + i)]};
        expected += term;
        size += std::abs(term);
      }
      const double off = std::abs(whole[static_cast<std::size_t>(t * c.out + o)] - expected) / size;
      expect(off < 2e-6, name(isa), static_cast<int>(format), static_cast<int>(order), c.out, c.in, "off by", off);
    }
  for (const int64_t tokens : {1, 2, 5, 8, 17}) {
    const Floats some = run(isa, matrix, x, 3, tokens, std::min<int64_t>(c.out, 16));
    const Floats same_tokens(whole.begin() + 3 * c.out, whole.begin() + (3 + tokens) * c.out);
    expect(same(some, same_tokens), name(isa), c.out, c.in, tokens, "tokens alone are not those among others");
  }
}

// Skipping inputs that are zero for every token changes no bit.
void check_active(Isa isa, Format format, const Case& c, Random& random) {
  const Stored w = stored(random, c.out * c.in, format);
  const Matrix matrix{w.data(), format, Order::columns, c.out, c.in};
  const ProductKernels& kernels = product_kernels(isa);
  const int64_t tokens = std::min<int64_t>(2, kernels.few_tokens);
  Floats x = random.normals(tokens * c.in);
  std::vector<std::int32_t> active;
  for (int64_t i = 0; i < c.in; ++i)
    if (random.below(2))
      active.push_back(static_cast<std::int32_t>(i));
    else
      for (int64_t t = 0; t < tokens; ++t) x[static_cast<std::size_t>(t * c.in + i)] = 0;
  const Floats whole = run(isa, matrix, x, 0, tokens, c.out);
  Floats y(whole.size());
  Product product{x.data(), c.in, y.data(), c.out, tokens};
  product.active = active.data();
  product.active_count = static_cast<int64_t>(active.size());
  kernels.run[static_cast<int>(Order::columns)][static_cast<int>(format)](matrix, product, 0, c.out);
  expect(same(y, whole), name(isa), c.out, c.in, "skipping zeros changes the result");
}

TEST(products_are_sums_that_do_not_depend_on_the_tokens_beside_them) {
  Random random(1);
  for (const Isa isa : available_isas())
    for (const Format format : formats)
      for (const Case& c : cases) {
        for (const Order order : {Order::rows, Order::columns}) check(isa, format, order, c, random);
        check_active(isa, format, c, random);
      }
}

}  // namespace
}  // namespace rookery::tests
