// Arrays of Python as tensors of the runtime.
#pragma once

#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>

#include "runtime/weights.hpp"

namespace rookery {

using Array = nanobind::ndarray<nanobind::ro, nanobind::c_contig, nanobind::device::cpu>;

inline Tensor tensor(const Array& array) {
  Tensor tensor{array.data(), Format::float32, {}};
  for (std::size_t i = 0; i < array.ndim(); ++i) tensor.shape.push_back(static_cast<std::int64_t>(array.shape(i)));
  const auto type = array.dtype();
  if (type == nanobind::dtype<float>())
    tensor.format = Format::float32;
  else if (type == nanobind::dtype<std::uint16_t>())  // numpy itself knows no bfloat16
    tensor.format = Format::bfloat16;
  else if (type.code == static_cast<std::uint8_t>(nanobind::dlpack::dtype_code::Float) && type.bits == 16)
    tensor.format = Format::float16;
  else
    throw std::invalid_argument("a tensor is neither float32, float16 nor uint16 (the bits of bfloat16)");
  return tensor;
}

inline Format find_format(const std::string& name) {
  constexpr const char* names[format_count] = {"float32", "bfloat16", "float16", "int8", "q8_0", "int4", "q4_0",
                                                "q6_k"};
  for (int i = 0; i < format_count; ++i)
    if (name == names[i]) return static_cast<Format>(i);
  throw std::invalid_argument("no format '" + name + "'");
}

inline Order find_order(const std::string& name) {
  if (name == "rows") return Order::rows;
  if (name == "columns") return Order::columns;
  throw std::invalid_argument("no order '" + name + "'");
}

}  // namespace rookery
