#include "kernels/wkv7_output.hpp"

#include <nanobind/stl/string.h>

#include <string>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

constexpr std::int64_t least_tokens = 16;

void forward(
    Address y, Address r, Address k, Address v, Address gate, Address r_k, Address weight, Address bias, double eps,
    Address out, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, bool bfloat16, int threads,
    const std::string& isa) {
  const auto run = wkv7_output_kernels(find_isa(isa)).forward[bfloat16];
  nb::gil_scoped_release unlocked;
  const Wkv7Output in{heads,       head_dim,     static_cast<float>(eps), at<void>(y),      at<void>(r),    at<void>(k),
                      at<void>(v), at<void>(gate), at<float>(r_k),        at<float>(weight), at<float>(bias)};
  in_blocks(tokens, least_tokens, threads, [&](int, std::int64_t begin, std::int64_t end) {
    run(in, at<void>(out), begin, end);
  });
}

void backward(
    Address y, Address r, Address k, Address v, Address gate, Address r_k, Address weight, Address bias, double eps,
    Address grad_out, Address grad_y, Address grad_r, Address grad_k, Address grad_v, Address grad_gate,
    Address grad_parameters, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, bool bfloat16, int threads,
    const std::string& isa) {
  const auto run = wkv7_output_kernels(find_isa(isa)).backward[bfloat16];
  nb::gil_scoped_release unlocked;
  const Wkv7Output in{heads,       head_dim,     static_cast<float>(eps), at<void>(y),      at<void>(r),    at<void>(k),
                      at<void>(v), at<void>(gate), at<float>(r_k),        at<float>(weight), at<float>(bias)};
  const Wkv7OutputGrads grads{at<void>(grad_out), at<void>(grad_y), at<void>(grad_r),
                              at<void>(grad_k),   at<void>(grad_v), at<void>(grad_gate)};
  Sums sums(3 * heads * head_dim);
  in_blocks(tokens, least_tokens, threads, [&](int block, std::int64_t begin, std::int64_t end) {
    run(in, grads, sums.of(block), begin, end);
  });
  sums.add_up(at<float>(grad_parameters), 3 * heads * head_dim);
}

}  // namespace

void bind_wkv7_output(nb::module_& m) {
  m.def(
      "wkv7_output_forward", &forward, nb::kw_only(), "y"_a, "r"_a, "k"_a, "v"_a, "gate"_a, "r_k"_a, "weight"_a,
      "bias"_a, "eps"_a, "out"_a, "tokens"_a, "heads"_a, "head_dim"_a, "bfloat16"_a, "threads"_a, "isa"_a);
  m.def(
      "wkv7_output_backward", &backward, nb::kw_only(), "y"_a, "r"_a, "k"_a, "v"_a, "gate"_a, "r_k"_a, "weight"_a,
      "bias"_a, "eps"_a, "grad_out"_a, "grad_y"_a, "grad_r"_a, "grad_k"_a, "grad_v"_a, "grad_gate"_a,
      "grad_parameters"_a, "tokens"_a, "heads"_a, "head_dim"_a, "bfloat16"_a, "threads"_a, "isa"_a);
}

}  // namespace rookery
