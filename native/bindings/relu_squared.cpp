#include "kernels/relu_squared.hpp"

#include <nanobind/stl/string.h>

#include <string>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

constexpr std::int64_t least_elements = 16384;

void forward(Address x, Address y, std::int64_t count, bool bfloat16, int threads, const std::string& isa) {
  const auto run = relu_squared_kernels(find_isa(isa)).forward[bfloat16];
  nb::gil_scoped_release unlocked;
  in_blocks(count, least_elements, threads, [&](int, std::int64_t begin, std::int64_t end) {
    run(at<void>(x), at<void>(y), begin, end);
  });
}

void backward(
    Address x, Address grad_y, Address grad_x, std::int64_t count, bool bfloat16, int threads, const std::string& isa) {
  const auto run = relu_squared_kernels(find_isa(isa)).backward[bfloat16];
  nb::gil_scoped_release unlocked;
  in_blocks(count, least_elements, threads, [&](int, std::int64_t begin, std::int64_t end) {
    run(at<void>(x), at<void>(grad_y), at<void>(grad_x), begin, end);
  });
}

}  // namespace

void bind_relu_squared(nb::module_& m) {
  m.def("relu_squared_forward", &forward, nb::kw_only(), "x"_a, "y"_a, "count"_a, "bfloat16"_a, "threads"_a, "isa"_a);
  m.def(
      "relu_squared_backward", &backward, nb::kw_only(), "x"_a, "grad_y"_a, "grad_x"_a, "count"_a, "bfloat16"_a,
      "threads"_a, "isa"_a);
}

}  // namespace rookery
