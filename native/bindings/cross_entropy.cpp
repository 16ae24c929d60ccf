#include "kernels/cross_entropy.hpp"

#include <nanobind/stl/string.h>

#include <string>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

void cross_entropy_rows(
    Address logits, Address targets, Address losses, std::int64_t rows, std::int64_t vocabulary, std::int64_t ignored,
    float scale, float pull, bool gradient, bool bfloat16, int threads, const std::string& isa) {
  const CrossEntropyKernels& kernels = cross_entropy_kernels(find_isa(isa));
  const auto run = gradient ? kernels.gradient[bfloat16] : kernels.losses[bfloat16];
  nb::gil_scoped_release unlocked;
  const CrossEntropy call{
      vocabulary, ignored, at<void>(logits), at<std::int64_t>(targets), at<float>(losses), scale, pull};
  in_blocks(rows, 4, threads, [&](int, std::int64_t begin, std::int64_t end) { run(call, begin, end); });
}

}  // namespace

void bind_cross_entropy(nb::module_& m) {
  m.def(
      "cross_entropy", &cross_entropy_rows, nb::kw_only(), "logits"_a, "targets"_a, "losses"_a, "rows"_a,
      "vocabulary"_a, "ignored"_a, "scale"_a, "pull"_a, "gradient"_a, "bfloat16"_a, "threads"_a, "isa"_a);
}

}  // namespace rookery
