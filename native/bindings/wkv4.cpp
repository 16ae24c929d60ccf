#include "kernels/wkv4.hpp"

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

Wkv4Shape shape_of(const Starts& starts, const std::vector<std::int64_t>& chunks, std::int64_t channels) {
  return {static_cast<std::int64_t>(starts.size()) - 1, channels, starts.data(), chunks.data()};
}

Wkv4Inputs inputs(Address log_w, Address u, const Tensor& k, const Tensor& v, Address state) {
  return {at<float>(log_w), at<float>(u), head_tensor(k), head_tensor(v), at<float>(state)};
}

template <class Work>
void for_each_part(const Wkv4Shape& shape, int threads, Work&& work) {
  const std::int64_t parts = (shape.channels + wkv4_channels - 1) / wkv4_channels;
  parallel_for(static_cast<int>(shape.rows * parts), threads, [&](int i) {
    work(i / parts, i % parts * wkv4_channels);
  });
}

void forward(
    const Starts& starts, std::int64_t channels, Address log_w, Address u, const Tensor& k, const Tensor& v,
    Address state, const Tensor& y, Address last_state, Address checkpoints, int threads, const std::string& isa) {
  const auto run = wkv4_kernels(find_isa(isa)).forward;
  const auto chunks = first_chunks(starts, wkv4_chunk);
  const Wkv4Shape shape = shape_of(starts, chunks, channels);
  const Wkv4Inputs in = inputs(log_w, u, k, v, state);
  const Wkv4Results out{head_tensor(y), at<float>(last_state), at<float>(checkpoints)};
  nb::gil_scoped_release unlocked;
  for_each_part(shape, threads, [&](std::int64_t row, std::int64_t first) { run(shape, in, out, row, first); });
}

void backward(
    const Starts& starts, std::int64_t channels, Address log_w, Address u, const Tensor& k, const Tensor& v,
    Address state, Address checkpoints, const Tensor& grad_y, Address grad_last_state, Address grad_log_w,
    Address grad_u, const Tensor& grad_k, const Tensor& grad_v, Address grad_state, int threads,
    const std::string& isa) {
  const auto run = wkv4_kernels(find_isa(isa)).backward;
  const auto chunks = first_chunks(starts, wkv4_chunk);
  const Wkv4Shape shape = shape_of(starts, chunks, channels);
  const Wkv4Inputs in = inputs(log_w, u, k, v, state);
  const Wkv4Grads out{head_tensor(grad_y), at<float>(grad_last_state), at<float>(grad_log_w), at<float>(grad_u),
                      head_tensor(grad_k), head_tensor(grad_v),        at<float>(grad_state)};
  const float* kept = at<float>(checkpoints);
  nb::gil_scoped_release unlocked;
  for_each_part(shape, threads, [&](std::int64_t row, std::int64_t first) { run(shape, in, kept, out, row, first); });
}

}  // namespace

void bind_wkv4(nb::module_& m) {
  m.attr("WKV4_CHUNK") = wkv4_chunk;
  m.def("wkv4_forward", &forward, nb::kw_only(), "starts"_a, "channels"_a, "log_w"_a, "u"_a, "k"_a, "v"_a, "state"_a,
        "y"_a, "last_state"_a, "checkpoints"_a, "threads"_a, "isa"_a,
        "checkpoints may be 0 where no gradient is needed.");
  m.def("wkv4_backward", &backward, nb::kw_only(), "starts"_a, "channels"_a, "log_w"_a, "u"_a, "k"_a, "v"_a,
        "state"_a, "checkpoints"_a, "grad_y"_a, "grad_last_state"_a, "grad_log_w"_a, "grad_u"_a, "grad_k"_a,
        "grad_v"_a, "grad_state"_a, "threads"_a, "isa"_a,
        "Gradients of log_w and u are float32 [rows, channels]; grad_y and grad_last_state may be 0, which means "
        "zeros.");
}

}  // namespace rookery
