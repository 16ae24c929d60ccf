#include "kernels/bi_wkv.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <string>

#include "bindings/module.hpp"
#include "bindings/sequences.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

template <class Work>
void for_each_part(std::int64_t batch, const BiWkvShape& shape, int threads, Work&& work) {
  const std::int64_t parts = (shape.channels + bi_wkv_channels - 1) / bi_wkv_channels;
  parallel_for(static_cast<int>(batch * parts), threads, [&](int i) { work(i / parts, i % parts * bi_wkv_channels); });
}

void forward(
    std::int64_t batch, std::int64_t tokens, std::int64_t channels, Address omega, Address mu, const Tensor& k,
    const Tensor& v, const Tensor& y, int threads, const std::string& isa) {
  const auto run = bi_wkv_kernels(find_isa(isa)).forward;
  const BiWkvShape shape{tokens, channels};
  const BiWkvInputs in{at<float>(omega), at<float>(mu), head_tensor(k), head_tensor(v)};
  nb::gil_scoped_release unlocked;
  for_each_part(batch, shape, threads, [&](std::int64_t row, std::int64_t first) {
    run(shape, in, head_tensor(y), row, first);
  });
}

void backward(
    std::int64_t batch, std::int64_t tokens, std::int64_t channels, Address omega, Address mu, const Tensor& k,
    const Tensor& v, const Tensor& grad_y, Address grad_omega, Address grad_mu, const Tensor& grad_k,
    const Tensor& grad_v, int threads, const std::string& isa) {
  const auto run = bi_wkv_kernels(find_isa(isa)).backward;
  const BiWkvShape shape{tokens, channels};
  const BiWkvInputs in{at<float>(omega), at<float>(mu), head_tensor(k), head_tensor(v)};
  const BiWkvGrads out{head_tensor(grad_y), at<float>(grad_omega), at<float>(grad_mu), head_tensor(grad_k),
                       head_tensor(grad_v)};
  nb::gil_scoped_release unlocked;
  for_each_part(batch, shape, threads, [&](std::int64_t row, std::int64_t first) { run(shape, in, out, row, first); });
}

}  // namespace

void bind_bi_wkv(nb::module_& m) {
  m.def("bi_wkv_forward", &forward, nb::kw_only(), "batch"_a, "tokens"_a, "channels"_a, "omega"_a, "mu"_a, "k"_a,
        "v"_a, "y"_a, "threads"_a, "isa"_a);
  m.def("bi_wkv_backward", &backward, nb::kw_only(), "batch"_a, "tokens"_a, "channels"_a, "omega"_a, "mu"_a, "k"_a,
        "v"_a, "grad_y"_a, "grad_omega"_a, "grad_mu"_a, "grad_k"_a, "grad_v"_a, "threads"_a, "isa"_a,
        "Gradients of omega and mu are float32 [batch, channels].");
}

}  // namespace rookery
