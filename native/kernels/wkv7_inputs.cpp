#include "kernels/wkv7_inputs.hpp"

#include <cmath>

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

constexpr float log_decay_scale = -0.60653066f;  // −e^(−1/2)
constexpr float norm_floor = 1e-12f;

template <class T>
void forward(const Wkv7InputsArguments& in, const Wkv7InputsResults& out, std::int64_t begin, std::int64_t end) {
  for (std::int64_t head = begin * in.heads; head < end * in.heads; ++head) {
    const std::int64_t place = head * in.head_dim, channel = head % in.heads * in.head_dim;
    const T* key = static_cast<const T*>(in.k) + place;
    const T* decay = static_cast<const T*>(in.decay_logit) + place;
    const T* rate = static_cast<const T*>(in.rate_logit) + place;
    vfloat squares{};
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat removal = load(key + j, part) * load(in.k_k + channel + j, part);
      squares += removal * removal;
    });
    const float norm = std::sqrt(sum(squares));
    const float inverse = 1.0f / (norm < norm_floor ? norm_floor : norm);
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat k = load(key + j, part);
      const vfloat removal = k * load(in.k_k + channel + j, part) * inverse;
      const Sigmoid learn = sigmoid(load(rate + j, part));
      store(out.log_w + place + j, log_decay_scale * sigmoid(load(decay + j, part)).value, part);
      store(static_cast<T*>(out.k) + place + j, k * (1.0f - learn.rest * load(in.k_a + channel + j, part)), part);
      store(static_cast<T*>(out.a) + place + j, -removal, part);
      store(static_cast<T*>(out.b) + place + j, removal * learn.value, part);
    });
  }
}

template <class T>
void backward(const Wkv7InputsArguments& in, const Wkv7InputsGrads& g, float* sums, std::int64_t begin, std::int64_t end) {
  float* sum_k_k = sums;
  float* sum_k_a = sums + in.heads * in.head_dim;
  for (std::int64_t head = begin * in.heads; head < end * in.heads; ++head) {
    const std::int64_t place = head * in.head_dim, channel = head % in.heads * in.head_dim;
    const T* key = static_cast<const T*>(in.k) + place;
    const T* decay = static_cast<const T*>(in.decay_logit) + place;
    const T* rate = static_cast<const T*>(in.rate_logit) + place;
    const T* grad_k = static_cast<const T*>(g.k) + place;
    const T* grad_a = static_cast<const T*>(g.a) + place;
    const T* grad_b = static_cast<const T*>(g.b) + place;
    T* to_rate = static_cast<T*>(g.grad_rate_logit) + place;
    // κ = k ⊙ k_k; its unit vector κ̂ has gradient grad_b ⊙ rate − grad_a
    vfloat squares{}, products{};
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat k = load(key + j, part), gb = load(grad_b + j, part);
      const vfloat removal = k * load(in.k_k + channel + j, part);
      const vfloat grad_unit = gb * sigmoid(load(rate + j, part)).value - load(grad_a + j, part);
      squares += removal * removal;
      products += removal * grad_unit;
    });
    const float norm = std::sqrt(sum(squares));
    const bool floored = norm < norm_floor;  // then the norm is a constant
    const float inverse = 1.0f / (floored ? norm_floor : norm);
    const float along = floored ? 0.0f : sum(products) * inverse * inverse;
    sweep(in.head_dim, [&](std::int64_t j, auto part) {
      const vfloat k = load(key + j, part), gk = load(grad_k + j, part), gb = load(grad_b + j, part);
      const vfloat k_k = load(in.k_k + channel + j, part), k_a = load(in.k_a + channel + j, part);
      const Sigmoid learn = sigmoid(load(rate + j, part));
      const vfloat removal = k * k_k;
      const vfloat grad_unit = gb * learn.value - load(grad_a + j, part);
      const vfloat grad_removal = (grad_unit - removal * along) * inverse;
      store(static_cast<T*>(g.grad_k) + place + j, gk * (1.0f - learn.rest * k_a) + grad_removal * k_k, part);
      store(to_rate + j, (gk * k * k_a + gb * removal * inverse) * learn.slope, part);
      store(static_cast<T*>(g.grad_decay_logit) + place + j,
            log_decay_scale * load(g.log_w + place + j, part) * sigmoid(load(decay + j, part)).slope, part);
      store(sum_k_k + channel + j, load(sum_k_k + channel + j, part) + grad_removal * k, part);
      store(sum_k_a + channel + j, load(sum_k_a + channel + j, part) - gk * k * learn.rest, part);
    });
  }
}

}  // namespace

}  // namespace ROOKERY_ISA

const Wkv7InputsKernels ROOKERY_ISA::wkv7_inputs{
    {forward<float>, forward<std::uint16_t>}, {backward<float>, backward<std::uint16_t>}};

}  // namespace rookery
