#include "kernels/wkv7_output.hpp"

#include <cmath>

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

// One head of one token.
template <class T>
struct Head {
  std::int64_t place, channel;
  const T *y, *r, *k, *v, *gate;
  float mean, inverse, bonus;  // of y: mean, 1 / standard deviation; Σ r ⊙ k ⊙ r_k

  Head(const Wkv7Output& in, std::int64_t head)
      : place(head * in.head_dim), channel(head % in.heads * in.head_dim),
        y(static_cast<const T*>(in.y) + place), r(static_cast<const T*>(in.r) + place),
        k(static_cast<const T*>(in.k) + place), v(static_cast<const T*>(in.v) + place),
        gate(static_cast<const T*>(in.gate) + place) {
    const float share = 1.0f / static_cast<float>(in.head_dim);
    vfloat total{}, match{}, squares{};
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      total += load(y + j, part);
      match += load(r + j, part) * load(k + j, part) * load(in.r_k + channel + j, part);
    });
    mean = sum(total) * share;
    bonus = sum(match);
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat off = centred(j, part);
      squares += off * off;
    });
    inverse = 1.0f / std::sqrt(sum(squares) * share + in.eps);
  }

  vfloat centred(std::int64_t j, Whole whole) const { return load(y + j, whole) - mean; }
  // lanes beyond the head stay zero, so that they add nothing to a sum
  vfloat centred(std::int64_t j, Part part) const {
    float means[lanes] = {};
    for (std::size_t i = 0; i < part.count; ++i) means[i] = mean;
    return load(y + j, part) - load(means);
  }
};

template <class T>
void forward(const Wkv7Output& in, void* out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t head = begin * in.heads; head < end * in.heads; ++head) {
    const Head<T> h(in, head);
    T* result = static_cast<T*>(out) + h.place;
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat normed = h.centred(j, part) * h.inverse * load(in.weight + h.channel + j, part) +
                            load(in.bias + h.channel + j, part);
      store(result + j, (normed + h.bonus * load(h.v + j, part)) * load(h.gate + j, part), part);
    });
  }
}

template <class T>
void backward(const Wkv7Output& in, const Wkv7OutputGrads& g, float* sums, std::int64_t begin, std::int64_t end) {
  const std::int64_t channels = in.heads * in.head_dim;
  const float share = 1.0f / static_cast<float>(in.head_dim);
  for (std::int64_t head = begin * in.heads; head < end * in.heads; ++head) {
    const Head<T> h(in, head);
    const T* grad = static_cast<const T*>(g.out) + h.place;
    float* sum_r_k = sums + h.channel;
    float* sum_weight = sum_r_k + channels;
    float* sum_bias = sum_weight + channels;
    // ŷ the normalised y, z = ŷ ⊙ weight + bias + bonus · v, out = z ⊙ gate
    vfloat of_unit{}, of_unit_times_unit{}, of_bonus{};
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat grad_z = load(grad + j, part) * load(h.gate + j, part);
      const vfloat unit = h.centred(j, part) * h.inverse;
      const vfloat weight = load(in.weight + h.channel + j, part), v = load(h.v + j, part);
      const vfloat z = unit * weight + load(in.bias + h.channel + j, part) + h.bonus * v;
      of_unit += grad_z * weight;
      of_unit_times_unit += grad_z * weight * unit;
      of_bonus += grad_z * v;
      store(static_cast<T*>(g.grad_gate) + h.place + j, load(grad + j, part) * z, part);
      store(static_cast<T*>(g.grad_v) + h.place + j, grad_z * h.bonus, part);
      store(sum_weight + j, load(sum_weight + j, part) + grad_z * unit, part);
      store(sum_bias + j, load(sum_bias + j, part) + grad_z, part);
    });
    const float mean_grad = sum(of_unit) * share, along = sum(of_unit_times_unit) * share, grad_bonus = sum(of_bonus);
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat grad_unit =
          load(grad + j, part) * load(h.gate + j, part) * load(in.weight + h.channel + j, part);
      const vfloat unit = h.centred(j, part) * h.inverse;
      const vfloat r = load(h.r + j, part), k = load(h.k + j, part), r_k = load(in.r_k + h.channel + j, part);
      store(static_cast<T*>(g.grad_y) + h.place + j, h.inverse * (grad_unit - mean_grad - unit * along), part);
      store(static_cast<T*>(g.grad_r) + h.place + j, grad_bonus * k * r_k, part);
      store(static_cast<T*>(g.grad_k) + h.place + j, grad_bonus * r * r_k, part);
      store(sum_r_k + j, load(sum_r_k + j, part) + grad_bonus * r * k, part);
    });
  }
}

}  // namespace

}  // namespace ROOKERY_ISA

const Wkv7OutputKernels ROOKERY_ISA::wkv7_output{
    {forward<float>, forward<std::uint16_t>}, {backward<float>, backward<std::uint16_t>}};

}  // namespace rookery
