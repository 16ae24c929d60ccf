// What each binding file adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace rookery {

void bind_bi_wkv(nanobind::module_& m);
void bind_cross_entropy(nanobind::module_& m);
void bind_packing(nanobind::module_& m);
void bind_relu_squared(nanobind::module_& m);
void bind_runtime(nanobind::module_& m);
void bind_taylor_attention(nanobind::module_& m);
void bind_token_shift(nanobind::module_& m);
void bind_tokenizer(nanobind::module_& m);
void bind_wkv4(nanobind::module_& m);
void bind_wkv6(nanobind::module_& m);
void bind_wkv7(nanobind::module_& m);
void bind_wkv7_inputs(nanobind::module_& m);
void bind_wkv7_output(nanobind::module_& m);

}  // namespace rookery
