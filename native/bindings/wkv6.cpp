#include "kernels/wkv6.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/module.hpp"
#include "bindings/sequences.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Sizes = std::vector<std::int64_t>;  // heads, key, value

HeadShape shape_of(const Starts& starts, const std::vector<std::int64_t>& chunks, const Sizes& sizes) {
  const std::int64_t rows = static_cast<std::int64_t>(starts.size()) - 1;
  return {rows, sizes.at(0), sizes.at(1), sizes.at(2), starts.data(), chunks.data()};
}

Wkv6Inputs inputs(const std::vector<Tensor>& x, bool constant_decay, Address u, Address state) {
  return {head_tensor(x.at(0)), head_tensor(x.at(1)), head_tensor(x.at(2)), head_tensor(x.at(3)), constant_decay,
          at<float>(u),         at<float>(state)};
}

template <class Work>
void for_each_head(const HeadShape& shape, int threads, Work&& work) {
  parallel_for(static_cast<int>(shape.rows * shape.heads), threads, [&](int i) {
    work(i / shape.heads, i % shape.heads);
  });
}

void forward(
    const Starts& starts, const Sizes& sizes, const std::vector<Tensor>& x, bool constant_decay, Address u,
    Address state, const Tensor& y, Address last_state, Address checkpoints, int threads, const std::string& isa) {
  const auto run = wkv6_kernels(find_isa(isa)).forward;
  const auto chunks = first_chunks(starts, wkv6_chunk);
  const HeadShape shape = shape_of(starts, chunks, sizes);
  const Wkv6Inputs in = inputs(x, constant_decay, u, state);
  const Wkv6Results out{head_tensor(y), at<float>(last_state), at<float>(checkpoints)};
  nb::gil_scoped_release unlocked;
  for_each_head(shape, threads, [&](std::int64_t row, std::int64_t head) { run(shape, in, out, row, head); });
}

void backward(
    const Starts& starts, const Sizes& sizes, const std::vector<Tensor>& x, bool constant_decay, Address u,
    Address checkpoints, const Tensor& grad_y, Address grad_last_state, const std::vector<Tensor>& grads,
    Address grad_u, Address grad_state, int threads, const std::string& isa) {
  const auto run = wkv6_kernels(find_isa(isa)).backward;
  const auto chunks = first_chunks(starts, wkv6_chunk);
  const HeadShape shape = shape_of(starts, chunks, sizes);
  const Wkv6Inputs in = inputs(x, constant_decay, u, 0);
  const Wkv6Grads out{
      head_tensor(grad_y),     at<float>(grad_last_state), head_tensor(grads.at(0)), head_tensor(grads.at(1)),
      head_tensor(grads.at(2)), head_tensor(grads.at(3)),   at<float>(grads.at(1).first), at<float>(grad_u),
      at<float>(grad_state)};
  const float* kept = at<float>(checkpoints);
  nb::gil_scoped_release unlocked;
  for_each_head(shape, threads, [&](std::int64_t row, std::int64_t head) { run(shape, in, kept, out, row, head); });
}

}  // namespace

void bind_wkv6(nb::module_& m) {
  m.attr("WKV6_CHUNK") = wkv6_chunk;
  m.def("wkv6_forward", &forward, nb::kw_only(), "starts"_a, "sizes"_a, "inputs"_a, "constant_decay"_a, "u"_a,
        "state"_a, "y"_a, "last_state"_a, "checkpoints"_a, "threads"_a, "isa"_a,
        "Inputs are r, log_w, k, v; log_w is [heads, key] with constant_decay; checkpoints may be 0 where no gradient "
        "is needed.");
  m.def("wkv6_backward", &backward, nb::kw_only(), "starts"_a, "sizes"_a, "inputs"_a, "constant_decay"_a, "u"_a,
        "checkpoints"_a, "grad_y"_a, "grad_last_state"_a, "grads"_a, "grad_u"_a, "grad_state"_a, "threads"_a, "isa"_a,
        "Gradients in the order of the inputs; those of u and of a constant log_w are float32 [rows, heads, key]; "
        "grad_y and grad_last_state may be 0, which means zeros.");
}

}  // namespace rookery
