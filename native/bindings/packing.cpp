// Packed matrices: making them, and products with them by themselves, for tests and benchmarks.
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "core/threads.hpp"
#include "kernels/packing.hpp"
#include "kernels/prepared.hpp"
#include "kernels/product.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Bytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Blocks = nb::ndarray<const std::uint8_t, nb::c_contig, nb::device::cpu>;
using Vectors = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Results = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using std::int64_t;

void check(bool holds, const char* complaint) {
  if (!holds) throw std::invalid_argument(complaint);
}

int64_t units(Format format, Order order, int64_t out, int64_t in) {
  return order == Order::rows ? packing(format).panels(out) : packing(format).groups(in);
}

template <class Work>
void in_pieces(int64_t count, int threads, Work&& work) {
  const int64_t tasks = std::min<int64_t>(count, 64);
  nb::gil_scoped_release unlocked;
  parallel_for(static_cast<int>(tasks), threads, [&](int i) { work(count * i / tasks, count * (i + 1) / tasks); });
}

void pack(
    const Array& array, const std::string& format_name, const std::string& order_name, const Bytes& to, int threads,
    const std::string& isa) {
  const Tensor from = tensor(array);
  const Format format = find_format(format_name);
  const Order order = find_order(order_name);
  check(from.shape.size() == 2, "a packed matrix is made of a tensor with two dimensions");
  check(format == Format::int8 || format == Format::int4, "floats can be packed as int8 or int4");
  const Matrix matrix{from.data, from.format, Order::rows, from.shape[0], from.shape[1]};
  check(to.size() == Matrix{nullptr, format, order, matrix.out, matrix.in}.bytes(), "the result needs another size");
  const auto& kernels = packing_kernels(find_isa(isa));
  in_pieces(units(format, order, matrix.out, matrix.in), threads, [&](int64_t begin, int64_t end) {
    kernels.pack(matrix, format, order, begin, end, to.data());
  });
}

void repack(
    const Blocks& blocks, const std::string& format_name, const std::string& order_name, int64_t out, int64_t in,
    const Bytes& to, int threads) {
  const Format format = find_format(format_name);
  const Order order = find_order(order_name);
  check(format == Format::q8_0 || format == Format::q4_0 || format == Format::q6_k, "blocks are those of q8_0, q4_0 or q6_k");
  check(format != Format::q6_k || order == Order::rows, "q6_k is laid out by rows only");
  const int64_t of_block = format == Format::q6_k ? Packing::block : 32;
  check(in % of_block == 0 && out >= 0 && static_cast<int64_t>(blocks.size()) == out * (in / of_block) * block_bytes(format),
        "the blocks are not those of a matrix of this size");
  check(to.size() == Matrix{nullptr, format, order, out, in}.bytes(), "the result needs another size");
  const auto& kernels = packing_kernels(find_isa(""));
  in_pieces(units(format, order, out, in), threads, [&](int64_t begin, int64_t end) {
    kernels.repack(blocks.data(), format, order, out, in, begin, end, to.data());
  });
}

// y = W x for some tokens, as models compute it.
void product(
    const Array& weights, const std::string& format, const std::string& order, int64_t out, int64_t in,
    const Vectors& x, const Results& y, int64_t begin, int64_t end, bool sparse, const std::string& isa) {
  const Matrix matrix{weights.data(), find_format(format), find_order(order), out, in};
  check(matrix.format != Format::q6_k || matrix.order == Order::rows, "q6_k is laid out by rows only");
  check(weights.nbytes() == matrix.bytes(), "the matrix has another size");
  const auto tokens = static_cast<int64_t>(x.shape(0));
  check(static_cast<int64_t>(x.shape(1)) == in && static_cast<int64_t>(y.shape(0)) == tokens &&
            static_cast<int64_t>(y.shape(1)) == out && 0 <= begin && begin <= end && end <= out,
        "vectors and matrix do not fit together");
  const auto& kernels = product_kernels(find_isa(isa));
  Product product{x.data(), in, y.data(), out, tokens};
  std::vector<float> memory(static_cast<std::size_t>(prepared_floats(tokens, in)));
  prepare(kernels, matrix, product, memory.data());
  fill(kernels, product, 0, in, 0, tokens);
  std::vector<std::int32_t> active;
  if (sparse) {
    check(tokens <= kernels.few_tokens && matrix.order == Order::columns, "inputs are skipped in few tokens by columns");
    for (int64_t i = 0; i < in; ++i)
      for (int64_t t = 0; t < tokens; ++t)
        if (x.data()[t * in + i] != 0) {
          active.push_back(static_cast<std::int32_t>(i));
          break;
        }
    product.active = active.data();
    product.active_count = static_cast<int64_t>(active.size());
    active.push_back(0);  // never a null pointer
    product.active = active.data();
  }
  kernels.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](matrix, product, begin, end);
}

}  // namespace

void bind_packing(nb::module_& m) {
  m.def("packed_size", [](const std::string& format, const std::string& order, int64_t out, int64_t in) {
    check(out >= 0 && in >= 0, "sizes are not negative");
    return Matrix{nullptr, find_format(format), find_order(order), out, in}.bytes();
  }, "format"_a, "order"_a, "out"_a, "in_"_a, "Bytes of a packed matrix.");
  m.def("pack", &pack, "matrix"_a, "format"_a, "order"_a, "to"_a, "threads"_a = 0, "isa"_a = "",
        "Packs a matrix [out, in], bfloat16 as uint16, as int8 or int4 into `to`.");
  m.def("repack", &repack, "blocks"_a, "format"_a, "order"_a, "out"_a, "in_"_a, "to"_a, "threads"_a = 0,
        "Lays the blocks of a GGUF tensor, q8_0, q4_0 or q6_k, out for the products.");
  m.def("product", &product, "weights"_a, "format"_a, "order"_a, "out"_a, "in_"_a, "x"_a, "y"_a, "begin"_a, "end"_a,
        "sparse"_a = false, "isa"_a = "",
        "Writes outputs begin … end − 1 of W x[t] for tokens x [t, in] to y [t, out].");
}

}  // namespace rookery
