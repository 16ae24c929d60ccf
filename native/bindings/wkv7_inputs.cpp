#include "kernels/wkv7_inputs.hpp"

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
    Address k, Address decay_logit, Address rate_logit, Address k_k, Address k_a, Address log_w, Address k_out,
    Address a, Address b, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim, bool bfloat16, int threads,
    const std::string& isa) {
  const auto run = wkv7_inputs_kernels(find_isa(isa)).forward[bfloat16];
  nb::gil_scoped_release unlocked;
  const Wkv7InputsArguments in{heads,         head_dim, at<void>(k), at<void>(decay_logit), at<void>(rate_logit),
                      at<float>(k_k), at<float>(k_a)};
  const Wkv7InputsResults out{at<float>(log_w), at<void>(k_out), at<void>(a), at<void>(b)};
  in_blocks(tokens, least_tokens, threads, [&](int, std::int64_t begin, std::int64_t end) { run(in, out, begin, end); });
}

void backward(
    Address k, Address decay_logit, Address rate_logit, Address k_k, Address k_a, Address grad_log_w,
    Address grad_k_out, Address grad_a, Address grad_b, Address grad_k, Address grad_decay_logit,
    Address grad_rate_logit, Address grad_parameters, std::int64_t tokens, std::int64_t heads, std::int64_t head_dim,
    bool bfloat16, int threads, const std::string& isa) {
  const auto run = wkv7_inputs_kernels(find_isa(isa)).backward[bfloat16];
  nb::gil_scoped_release unlocked;
  const Wkv7InputsArguments in{heads,         head_dim, at<void>(k), at<void>(decay_logit), at<void>(rate_logit),
                      at<float>(k_k), at<float>(k_a)};
  const Wkv7InputsGrads grads{at<float>(grad_log_w), at<void>(grad_k_out),       at<void>(grad_a),
                              at<void>(grad_b),      at<void>(grad_k),           at<void>(grad_decay_logit),
                              at<void>(grad_rate_logit)};
  Sums sums(2 * heads * head_dim);
  in_blocks(tokens, least_tokens, threads, [&](int block, std::int64_t begin, std::int64_t end) {
    run(in, grads, sums.of(block), begin, end);
  });
  sums.add_up(at<float>(grad_parameters), 2 * heads * head_dim);
}

}  // namespace

void bind_wkv7_inputs(nb::module_& m) {
  m.def(
      "wkv7_inputs_forward", &forward, nb::kw_only(), "k"_a, "decay_logit"_a, "rate_logit"_a, "k_k"_a, "k_a"_a,
      "log_w"_a, "k_out"_a, "a"_a, "b"_a, "tokens"_a, "heads"_a, "head_dim"_a, "bfloat16"_a, "threads"_a, "isa"_a);
  m.def(
      "wkv7_inputs_backward", &backward, nb::kw_only(), "k"_a, "decay_logit"_a, "rate_logit"_a, "k_k"_a, "k_a"_a,
      "grad_log_w"_a, "grad_k_out"_a, "grad_a"_a, "grad_b"_a, "grad_k"_a, "grad_decay_logit"_a, "grad_rate_logit"_a,
      "grad_parameters"_a, "tokens"_a, "heads"_a, "head_dim"_a, "bfloat16"_a, "threads"_a, "isa"_a);
}

}  // namespace rookery
