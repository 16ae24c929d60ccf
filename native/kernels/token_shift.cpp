#include "kernels/token_shift.hpp"

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

// The document that `token` is in: the last one that starts at or before it and is not empty.
inline std::int64_t document_of(const TokenShift& s, std::int64_t token) {
  std::int64_t row = 0;
  while (s.starts[row + 1] <= token) ++row;
  return row;
}

template <class T>
inline const T* before(const TokenShift& s, std::int64_t token, std::int64_t row) {
  return token == s.starts[row] ? static_cast<const T*>(s.previous) + row * s.channels
                                : static_cast<const T*>(s.x) + (token - 1) * s.channels;
}

template <class T>
void forward(const TokenShift& s, void* out, std::int64_t begin, std::int64_t end) {
  const std::int64_t stride = s.tokens * s.channels;
  std::int64_t row = document_of(s, begin);
  for (std::int64_t token = begin; token < end; ++token) {
    while (s.starts[row + 1] <= token) ++row;
    const T* now = static_cast<const T*>(s.x) + token * s.channels;
    const T* old = before<T>(s, token, row);
    T* mixed = static_cast<T*>(out) + token * s.channels;
    sweep(s.channels, [&](std::int64_t j, auto part) {
      const vfloat x = load(now + j, part), step = load(old + j, part) - x;
      for (std::int64_t i = 0; i < s.mixes; ++i)
        store(mixed + i * stride + j, x + step * load(s.mix + i * s.channels + j, part), part);
    });
  }
}

// Adds up what the mixtures of one token send back to the token before it: Σ mix ⊙ grad.
template <class T>
void sent_back(const TokenShift& s, const T* grad, float* carried) {
  const std::int64_t stride = s.tokens * s.channels;
  sweep(s.channels, [&](std::int64_t j, auto part) {
    vfloat total{};
    for (std::int64_t i = 0; i < s.mixes; ++i)
      total += load(s.mix + i * s.channels + j, part) * load(grad + i * stride + j, part);
    store(carried + j, total, part);
  });
}

// Walks backwards: a token's gradient needs what the token after it sent back, kept in the last row of `sums`.
template <class T>
void backward(const TokenShift& s, const TokenShiftGrads& g, float* sums, std::int64_t begin, std::int64_t end) {
  const std::int64_t c = s.channels, stride = s.tokens * c;
  const T* grads = static_cast<const T*>(g.grad_out);
  float* carried = sums + s.mixes * c;
  std::int64_t row = document_of(s, end - 1);
  if (end < s.starts[row + 1]) sent_back(s, grads + end * c, carried);
  for (std::int64_t token = end - 1; token >= begin; --token) {
    while (s.starts[row] > token) --row;
    const T* now = static_cast<const T*>(s.x) + token * c;
    const T* old = before<T>(s, token, row);
    const T* grad = grads + token * c;
    T* to_x = static_cast<T*>(g.grad_x) + token * c;
    const bool is_first = token == s.starts[row], is_last = token + 1 == s.starts[row + 1];
    const T* from_last = static_cast<const T*>(g.grad_last) + row * c;
    T* to_previous = static_cast<T*>(g.grad_previous) + row * c;
    sweep(c, [&](std::int64_t j, auto part) {
      const vfloat step = load(old + j, part) - load(now + j, part);
      vfloat total{}, back{};
      for (std::int64_t i = 0; i < s.mixes; ++i) {
        const vfloat y = load(grad + i * stride + j, part);
        float* sum = sums + i * c + j;
        total += y;
        back += y * load(s.mix + i * c + j, part);
        store(sum, load(sum, part) + y * step, part);
      }
      const vfloat after = is_last ? load(from_last + j, part) : load(carried + j, part);
      store(to_x + j, total - back + after, part);
      store(carried + j, back, part);
      if (is_first) store(to_previous + j, back, part);
    });
  }
}

}  // namespace

}  // namespace ROOKERY_ISA

const TokenShiftKernels ROOKERY_ISA::token_shift{
    {forward<float>, forward<std::uint16_t>}, {backward<float>, backward<std::uint16_t>}};

}  // namespace rookery
