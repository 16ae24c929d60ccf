#include "kernels/elementwise.hpp"

#include <cmath>

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

// x − mean, zero beyond the end, so that it adds nothing to a sum.
inline vfloat off(const float* x, float mean, Whole) { return load(x) - mean; }
inline vfloat off(const float* x, float mean, Part part) {
  float values[lanes] = {};
  for (std::size_t i = 0; i < part.count; ++i) values[i] = x[i] - mean;
  return load(values);
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, float* out, int64_t count) {
  vfloat total{}, squares{};
  sweep(count, [&](int64_t j, auto part) { total += load(x + j, part); });
  const float mean = sum(total) / static_cast<float>(count);
  sweep(count, [&](int64_t j, auto part) {
    const vfloat d = off(x + j, mean, part);
    squares += d * d;
  });
  const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + eps);
  sweep(count, [&](int64_t j, auto part) {
    store(out + j, off(x + j, mean, part) * inverse * load(weight + j, part) + load(bias + j, part), part);
  });
}

template <class Function>
inline void map(float* x, int64_t count, Function function) {
  sweep(count, [&](int64_t j, auto part) { store(x + j, function(load(x + j, part)), part); });
}

void logistic(float* x, int64_t count) {
  map(x, count, [](vfloat v) { return sigmoid(v).value; });
}

void hyperbolic_tangent(float* x, int64_t count) {
  map(x, count, [](vfloat v) {
    const Sigmoid s = sigmoid(2.0f * v);
    return s.value - s.rest;
  });
}

void exponential(float* x, int64_t count) {
  map(x, count, [](vfloat v) { return exp(v); });
}

void decay(float* x, int64_t count) {
  map(x, count, [](vfloat v) {
    const vfloat log_w = -exp(v), w = exp(log_w);
    return log_w < splat(-87.0f) ? vfloat{} : w;
  });
}

void interpolate(const float* x, const float* before, const float* mix, float* weight, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    const vfloat from = load(x + j, part), way = load(before + j, part) - from;
    store(weight + j, from + way * (load(mix + j, part) + load(weight + j, part)), part);
  });
}

void approach(float* x, const float* target, const float* logit, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    const vfloat from = load(x + j, part), way = load(target + j, part) - from;
    store(x + j, from + way * sigmoid(load(logit + j, part)).value, part);
  });
}

void add_gated(float* x, const float* y, const float* logit, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    store(x + j, load(x + j, part) + load(y + j, part) * sigmoid(load(logit + j, part)).value, part);
  });
}

void times_logistic(float* x, const float* logit, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    store(x + j, load(x + j, part) * sigmoid(load(logit + j, part)).value, part);
  });
}

void times_silu(float* x, const float* logit, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    const vfloat z = load(logit + j, part);
    store(x + j, load(x + j, part) * (z * sigmoid(z).value), part);
  });
}

void add_parts(float* x, const float* parts, int64_t number, int64_t stride, int64_t count) {
  sweep(count, [&](int64_t j, auto part) {
    // begins with zero as the sums of `product` do
    vfloat total{};
    for (int64_t i = 0; i < number; ++i) total += load(parts + i * stride + j, part);
    store(x + j, load(x + j, part) + total, part);
  });
}

template <class T>
void widen(const void* x, float* out, int64_t count) {
  sweep(count, [&](int64_t j, auto part) { store(out + j, load(static_cast<const T*>(x) + j, part), part); });
}

}  // namespace
}  // namespace ROOKERY_ISA

const ElementwiseKernels ROOKERY_ISA::elementwise{
    ROOKERY_ISA::layer_norm,
    ROOKERY_ISA::hyperbolic_tangent,
    ROOKERY_ISA::logistic,
    ROOKERY_ISA::exponential,
    ROOKERY_ISA::decay,
    ROOKERY_ISA::interpolate,
    ROOKERY_ISA::approach,
    ROOKERY_ISA::add_gated,
    ROOKERY_ISA::times_logistic,
    ROOKERY_ISA::times_silu,
    ROOKERY_ISA::add_parts,
    {ROOKERY_ISA::widen<float>, ROOKERY_ISA::widen<std::uint16_t>, ROOKERY_ISA::widen<float16>}};

}  // namespace rookery
