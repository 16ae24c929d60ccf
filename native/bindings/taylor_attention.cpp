#include "kernels/taylor_attention.hpp"

#include <nanobind/stl/string.h>

#include <string>

#include "bindings/module.hpp"
#include "bindings/rows.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

constexpr std::int64_t least_heads = 4;

void step(
    Address q, Address k, Address v, Address state, Address y, Address after, std::int64_t heads, std::int64_t key,
    std::int64_t value, bool bfloat16, int threads, const std::string& isa) {
  const auto run = taylor_attention_kernels(find_isa(isa)).step[bfloat16];
  const TaylorStep call{key,         value,           at<void>(q),      at<void>(k), at<void>(v),
                        at<void>(y), at<float>(state), at<float>(after)};
  nb::gil_scoped_release unlocked;
  in_blocks(heads, least_heads, threads, [&](int, std::int64_t begin, std::int64_t end) { run(call, begin, end); });
}

}  // namespace

void bind_taylor_attention(nb::module_& m) {
  m.def("taylor_attention_step", &step, nb::kw_only(), "q"_a, "k"_a, "v"_a, "state"_a, "y"_a, "after"_a, "heads"_a,
        "key"_a, "value"_a, "bfloat16"_a, "threads"_a, "isa"_a,
        "One token of `heads` heads of all rows together; states are [heads, value + 1, features], and may not overlap.");
}

}  // namespace rookery
