#include "kernels/token_shift.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>
#include <vector>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

constexpr std::int64_t least_tokens = 16;

// Copies a row of `from` to a row of `to`; rows have `bytes` each.
void copy_row(Address to, std::int64_t to_row, Address from, std::int64_t from_row, std::int64_t bytes) {
  std::memcpy(at<char>(to) + to_row * bytes, at<char>(from) + from_row * bytes, bytes);
}

void forward(
    Address x, Address mix, Address previous, const std::vector<std::int64_t>& starts, Address out, Address last,
    std::int64_t channels, std::int64_t mixes, bool bfloat16, int threads, const std::string& isa) {
  const auto run = token_shift_kernels(find_isa(isa)).forward[bfloat16];
  const std::int64_t row_bytes = channels * (bfloat16 ? 2 : 4);
  nb::gil_scoped_release unlocked;
  const TokenShift shift{
      starts.back(), channels, mixes, starts.data(), at<void>(x), at<void>(previous), at<float>(mix)};
  in_blocks(shift.tokens, least_tokens, threads, [&](int, std::int64_t begin, std::int64_t end) {
    run(shift, at<void>(out), begin, end);
  });
  for (std::size_t row = 0; row + 1 < starts.size(); ++row) {
    const bool empty = starts[row] == starts[row + 1];
    copy_row(last, row, empty ? previous : x, empty ? row : starts[row + 1] - 1, row_bytes);
  }
}

void backward(
    Address x, Address mix, Address previous, const std::vector<std::int64_t>& starts, Address grad_out,
    Address grad_last, Address grad_x, Address grad_mix, Address grad_previous, std::int64_t channels,
    std::int64_t mixes, bool bfloat16, int threads, const std::string& isa) {
  const auto run = token_shift_kernels(find_isa(isa)).backward[bfloat16];
  const std::int64_t row_bytes = channels * (bfloat16 ? 2 : 4);
  nb::gil_scoped_release unlocked;
  const TokenShift shift{
      starts.back(), channels, mixes, starts.data(), at<void>(x), at<void>(previous), at<float>(mix)};
  const TokenShiftGrads grads{at<void>(grad_out), at<void>(grad_last), at<void>(grad_x), at<void>(grad_previous)};
  Sums sums((mixes + 1) * channels);
  in_blocks(shift.tokens, least_tokens, threads, [&](int block, std::int64_t begin, std::int64_t end) {
    run(shift, grads, sums.of(block), begin, end);
  });
  sums.add_up(at<float>(grad_mix), mixes * channels);
  for (std::size_t row = 0; row + 1 < starts.size(); ++row)
    if (starts[row] == starts[row + 1]) copy_row(grad_previous, row, grad_last, row, row_bytes);
}

}  // namespace

void bind_token_shift(nb::module_& m) {
  m.def(
      "token_shift_forward", &forward, nb::kw_only(), "x"_a, "mix"_a, "previous"_a, "starts"_a, "out"_a, "last"_a,
      "channels"_a, "mixes"_a, "bfloat16"_a, "threads"_a, "isa"_a);
  m.def(
      "token_shift_backward", &backward, nb::kw_only(), "x"_a, "mix"_a, "previous"_a, "starts"_a, "grad_out"_a,
      "grad_last"_a, "grad_x"_a, "grad_mix"_a, "grad_previous"_a, "channels"_a, "mixes"_a, "bfloat16"_a, "threads"_a,
      "isa"_a);
}

}  // namespace rookery
