// Functions of single float32 vectors that models apply between their products.
#pragma once

#include <cstdint>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery {

struct ElementwiseKernels {
  // out = (x − mean) / √(variance + eps) · weight + bias; `out` may be `x`.
  void (*layer_norm)(
      const float* x, const float* weight, const float* bias, float eps, float* out, std::int64_t count);
  // In place.
  void (*hyperbolic_tangent)(float* x, std::int64_t count);
  void (*logistic)(float* x, std::int64_t count);
  void (*exponential)(float* x, std::int64_t count);
  // x = e^(−e^x), 0 where float32 has no more than a few digits of it
  void (*decay)(float* x, std::int64_t count);
  // weight = x + (before − x) · (mix + weight)
  void (*interpolate)(const float* x, const float* before, const float* mix, float* weight, std::int64_t count);
  // x += (target − x) · logistic(logit)
  void (*approach)(float* x, const float* target, const float* logit, std::int64_t count);
  // x += y · logistic(logit)
  void (*add_gated)(float* x, const float* y, const float* logit, std::int64_t count);
  // x *= logistic(logit)
  void (*times_logistic)(float* x, const float* logit, std::int64_t count);
  // x *= logit · logistic(logit)
  void (*times_silu)(float* x, const float* logit, std::int64_t count);
  // x += parts[0] + parts[1] + …, each `stride` floats after the one before it; there is at least one.
  void (*add_parts)(float* x, const float* parts, std::int64_t number, std::int64_t stride, std::int64_t count);
  // Numbers of a format as float32.
  void (*widen[float_format_count])(const void* x, float* out, std::int64_t count);
};

ROOKERY_DECLARE_KERNELS(ElementwiseKernels, elementwise)

}  // namespace rookery
