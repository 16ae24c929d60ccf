#include "kernels/wkv7.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"
#include "core/threads.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Tensor = std::pair<Address, bool>;   // data_ptr() and whether it is bfloat16 (else float32)
using Starts = std::vector<std::int64_t>;  // [rows + 1], first token of each row, and the number of tokens
using Sizes = std::vector<std::int64_t>;   // heads, key, value

Wkv7Tensor tensor(const Tensor& given) { return {at<void>(given.first), given.second}; }

Wkv7Inputs inputs(const std::vector<Tensor>& x, Address state) {
  return {tensor(x.at(0)), tensor(x.at(1)), tensor(x.at(2)), tensor(x.at(3)),
          tensor(x.at(4)), tensor(x.at(5)), at<float>(state)};
}

// Where the checkpoints of each row start; every row starts a chunk of its own.
std::vector<std::int64_t> first_chunks(const Starts& starts) {
  std::vector<std::int64_t> chunks{0};
  for (std::size_t row = 0; row + 1 < starts.size(); ++row)
    chunks.push_back(chunks.back() + (starts[row + 1] - starts[row] + wkv7_chunk - 1) / wkv7_chunk);
  return chunks;
}

Wkv7Shape shape_of(const Starts& starts, const std::vector<std::int64_t>& chunks, const Sizes& sizes) {
  const std::int64_t rows = static_cast<std::int64_t>(starts.size()) - 1;
  return {rows, sizes.at(0), sizes.at(1), sizes.at(2), starts.data(), chunks.data()};
}

template <class Work>
void for_each_head(const Wkv7Shape& shape, int threads, Work&& work) {
  parallel_for(static_cast<int>(shape.rows * shape.heads), threads, [&](int i) {
    work(i / shape.heads, i % shape.heads);
  });
}

void forward(
    const Starts& starts, const Sizes& sizes, const std::vector<Tensor>& x, Address state, const Tensor& y,
    Address last_state, Address checkpoints, Address removed, int threads, const std::string& isa) {
  const auto run = wkv7_kernels(find_isa(isa)).forward;
  const auto chunks = first_chunks(starts);
  const Wkv7Shape shape = shape_of(starts, chunks, sizes);
  const Wkv7Inputs in = inputs(x, state);
  const Wkv7Results out{tensor(y), at<float>(last_state), at<float>(checkpoints), at<float>(removed)};
  nb::gil_scoped_release unlocked;
  for_each_head(shape, threads, [&](std::int64_t row, std::int64_t head) { run(shape, in, out, row, head); });
}

void backward(
    const Starts& starts, const Sizes& sizes, const std::vector<Tensor>& x, Address checkpoints, Address removed,
    const Tensor& grad_y, Address grad_last_state, const std::vector<Tensor>& grads, Address grad_state, int threads,
    const std::string& isa) {
  const auto run = wkv7_kernels(find_isa(isa)).backward;
  const auto chunks = first_chunks(starts);
  const Wkv7Shape shape = shape_of(starts, chunks, sizes);
  const Wkv7Inputs in = inputs(x, 0);
  const Wkv7Results kept{{}, nullptr, at<float>(checkpoints), at<float>(removed)};
  const Wkv7Grads out{tensor(grad_y),      at<float>(grad_last_state), tensor(grads.at(0)),
                      tensor(grads.at(1)), tensor(grads.at(2)),        tensor(grads.at(3)),
                      tensor(grads.at(4)), tensor(grads.at(5)),        at<float>(grad_state)};
  nb::gil_scoped_release unlocked;
  for_each_head(shape, threads, [&](std::int64_t row, std::int64_t head) { run(shape, in, kept, out, row, head); });
}

}  // namespace

void bind_wkv7(nb::module_& m) {
  m.attr("WKV7_CHUNK") = wkv7_chunk;
  m.def("wkv7_forward", &forward, nb::kw_only(), "starts"_a, "sizes"_a, "inputs"_a, "state"_a, "y"_a, "last_state"_a,
        "checkpoints"_a, "removed"_a, "threads"_a, "isa"_a,
        "Inputs are r, log_w, k, v, a, b; checkpoints and removed may both be 0 where no gradient is needed.");
  m.def("wkv7_backward", &backward, nb::kw_only(), "starts"_a, "sizes"_a, "inputs"_a, "checkpoints"_a, "removed"_a,
        "grad_y"_a, "grad_last_state"_a, "grads"_a, "grad_state"_a, "threads"_a, "isa"_a,
        "Gradients in the order of the inputs; grad_y and grad_last_state may be 0, which means zeros.");
}

}  // namespace rookery
