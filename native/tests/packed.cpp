// Products with packed matrices of 8 and 4 bits, which give the same bits on every instruction set.
#include "kernels/packing.hpp"
#include "kernels/prepared.hpp"
#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;
using Bytes = std::vector<std::uint8_t>;

struct Case {
  int64_t out, in;
};
constexpr Case cases[] = {{1, 1}, {5, 3}, {33, 40}, {77, 201}, {64, 128}, {16, 300}, {160, 64}};
constexpr int64_t tokens = 19;

struct PackedMatrix {
  Bytes bytes;
  Matrix matrix;
};

// Calls fill(begin, end, to) for two parts of the units.
template <class Fill>
PackedMatrix packed(Format format, Order order, const Case& c, Fill&& fill) {
  PackedMatrix made{{}, {nullptr, format, order, c.out, c.in}};
  const Packing p = packing(format);
  made.bytes.resize(made.matrix.bytes());
  made.matrix.data = made.bytes.data();
  const int64_t units = order == Order::rows ? p.panels(c.out) : p.groups(c.in);
  fill(0, units / 2, made.bytes.data());
  fill(units / 2, units, made.bytes.data());
  return made;
}

Floats run(Isa isa, const Matrix& matrix, const Floats& x, int64_t first, int64_t count) {
  const ProductKernels& kernels = product_kernels(isa);
  Floats y(static_cast<std::size_t>(count * matrix.out));
  Floats memory(static_cast<std::size_t>(prepared_floats(count, matrix.in)));
  Product product{x.data() + first * matrix.in, matrix.in, y.data(), matrix.out, count};
  prepare(kernels, matrix, product, memory.data());
  fill(kernels, product, 0, matrix.in, 0, count);
  kernels.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](matrix, product, 0, matrix.out);
  return y;
}

// Weights [out, in] as they are after packing.
Floats weights_of(const Matrix& by_rows) {
  Floats w(static_cast<std::size_t>(by_rows.out * by_rows.in));
  for (int64_t o = 0; o < by_rows.out; ++o)
    product_kernels(Isa::portable).row(by_rows, o, w.data() + o * by_rows.in);
  return w;
}

void check_close(const Floats& y, const Floats& w, const Floats& x, const Case& c, const char* what) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < c.out; ++o) {
      double expected = 0, largest = 0, size = 0;
      for (int64_t i = 0; i < c.in; ++i) {
        const double of_x = x[static_cast<std::size_t>(t * c.in + i)], of_w = w[static_cast<std::size_t>(o * c.in + i)];
        expected += of_w * of_x;
        largest = std::max(largest, std::abs(of_x));
        size += std::abs(of_w);
      }
      // half a step of the vector's numbers for every weight
      const double off = std::abs(y[static_cast<std::size_t>(t * c.out + o)] - expected);
      expect(off <= 1e-5 + size * largest / 127 * 0.51, what, c.out, c.in, "off by", off);
    }
}

void check(Format format, Order order, const PackedMatrix& made, const Floats& w, const Case& c, Floats& first) {
  Random random(61);
  const Floats x = random.normals(tokens * c.in);
  for (const Isa isa : every_isa()) {
    const Floats y = run(isa, made.matrix, x, 0, tokens);
    if (first.empty()) {
      first = y;
      check_close(y, w, x, c, "packed product");
    }
    expect(same(y, first), name(isa), static_cast<int>(format), static_cast<int>(order), c.out, c.in, "other bits");
    for (const int64_t count : {1, 3, 8}) {
      const Floats some = run(isa, made.matrix, x, 5, count);
      const Floats wanted(y.begin() + 5 * c.out, y.begin() + (5 + count) * c.out);
      expect(same(some, wanted), name(isa), static_cast<int>(format), c.out, c.in, count, "tokens alone");
    }
  }
}

TEST(packed_products_are_the_same_bits_on_every_instruction_set_and_in_both_orders) {
  Random random(60);
  for (const Format format : {Format::int8, Format::int4})
    for (const Case& c : cases) {
      const Stored given = stored(random, c.out * c.in, Format::bfloat16);
      const Matrix from{given.data(), Format::bfloat16, Order::rows, c.out, c.in};
      Floats first, w;
      for (const Order order : {Order::rows, Order::columns}) {
        Bytes portable;
        for (const Isa isa : available_isas()) {
          const auto made = packed(format, order, c, [&](int64_t begin, int64_t end, std::uint8_t* to) {
            packing_kernels(isa).pack(from, format, order, begin, end, to);
          });
          if (portable.empty()) portable = made.bytes;
          expect(made.bytes == portable, name(isa), c.out, c.in, "is packed into other bytes");
          if (w.empty()) w = weights_of(made.matrix);
          if (isa == available_isas().back()) check(format, order, made, w, c, first);
        }
      }
      const double step = format == Format::int8 ? 0.02 : 0.25;
      expect(apart(w, given.values, 3) < step, c.out, c.in, "weights moved by", apart(w, given.values));
    }
}

TEST(blocks_of_gguf_files_are_repacked_without_loss) {
  Random random(62);
  for (const Format format : {Format::q8_0, Format::q4_0})
    for (const Case c : {Case{1, 32}, Case{37, 96}, Case{160, 64}}) {
      const int64_t of_block = format == Format::q8_0 ? 34 : 18, blocks = c.out * c.in / 32;
      Bytes given;
      Floats want;
      for (int64_t b = 0; b < blocks; ++b) {
        const auto scale = static_cast<std::uint16_t>((8 + random.below(8)) << 10 | random.below(1024));
        given.push_back(static_cast<std::uint8_t>(scale & 255));
        given.push_back(static_cast<std::uint8_t>(scale >> 8));
        for (int64_t i = 2; i < of_block; ++i) {
          // −128 does not occur: the largest number of a block is its scale times 127
          const int byte = format == Format::q8_0 ? random.below(255) - 127 : random.below(256);
          given.push_back(static_cast<std::uint8_t>(byte));
        }
        const std::uint8_t* codes = given.data() + given.size() - (of_block - 2);
        for (int i = 0; i < 32; ++i) {
          const int code = format == Format::q8_0 ? static_cast<std::int8_t>(codes[i])
                                                  : (i < 16 ? codes[i] & 15 : codes[i - 16] >> 4) - 8;
          want.push_back(widened(scale, Format::float16) * static_cast<float>(code));
        }
      }
      Floats first;
      for (const Order order : {Order::rows, Order::columns})
        for (const Isa isa : available_isas()) {
          const auto made = packed(format, order, c, [&](int64_t begin, int64_t end, std::uint8_t* to) {
            packing_kernels(isa).repack(given.data(), format, order, c.out, c.in, begin, end, to);
          });
          if (order == Order::rows)
            expect(same(weights_of(made.matrix), want), name(isa), c.out, c.in, "other weights");
          check(format, order, made, want, c, first);
        }
    }
}

TEST(blocks_of_six_bits_are_repacked_without_loss) {
  Random random(63);
  for (const Case c : {Case{1, 256}, Case{37, 512}, Case{48, 768}}) {
    Bytes given;
    Floats want;
    for (int64_t b = 0; b < c.out * c.in / 256; ++b) {
      // by the format's own description: 128 bytes of low halves, 64 of two more bits, 16 scales, their scale
      for (int i = 0; i < 208; ++i) given.push_back(static_cast<std::uint8_t>(random.below(256)));
      const auto scale = static_cast<std::uint16_t>((4 + random.below(8)) << 10 | random.below(1024));
      given.push_back(static_cast<std::uint8_t>(scale & 255));
      given.push_back(static_cast<std::uint8_t>(scale >> 8));
      const std::uint8_t* block = given.data() + given.size() - 210;
      for (int i = 0; i < 256; ++i) {
        const int half = i / 128, part = i % 128 / 32, j = i % 32;
        const int low = block[64 * half + part % 2 * 32 + j], high = block[128 + 32 * half + j];
        const int code = (part < 2 ? low & 15 : low >> 4) | (high >> (2 * part) & 3) << 4;
        const auto of_run = static_cast<float>(static_cast<std::int8_t>(block[192 + i / 16]));
        want.push_back(widened(scale, Format::float16) * of_run * static_cast<float>(code - 32));
      }
    }
    Floats first;
    for (const Isa isa : available_isas()) {
      const auto made = packed(Format::q6_k, Order::rows, c, [&](int64_t begin, int64_t end, std::uint8_t* to) {
        packing_kernels(isa).repack(given.data(), Format::q6_k, Order::rows, c.out, c.in, begin, end, to);
      });
      expect(same(weights_of(made.matrix), want), name(isa), c.out, c.in, "other weights");
      check(Format::q6_k, Order::rows, made, want, c, first);
    }
  }
}

}  // namespace
}  // namespace rookery::tests
