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

// What a token's gradient needs besides its own mixtures' gradients, and where the results go.
template <class T>
struct Step {
  const T *now, *old, *grad;
  const T* from_last;  // the gradient of the document's last token as a result; null unless this is that token
  T *to_x, *to_before;  // the gradients of this token and of the one before it; null where others write them
  float *sums, *pending;  // `pending`: what the token before has so far, then what this one has

  // Channels j …, `vectors` vectors together: two whole cache lines of each mixture are used at once, because mixtures
  // lie a power of two apart and would push each other out of the cache.
  template <int vectors, class Lanes>
  [[gnu::always_inline]] void run(const TokenShift& s, std::int64_t j, Lanes part) const {
    vfloat step[vectors], total[vectors]{}, back[vectors]{};
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) step[n] = load(old + j + n * lanes, part) - load(now + j + n * lanes, part);
    for (std::int64_t i = 0; i < s.mixes; ++i) {
      const T* from = grad + i * s.tokens * s.channels + j;
      const float* mix = s.mix + i * s.channels + j;
      float* sum = sums + i * s.channels + j;
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        const vfloat y = load(from + n * lanes, part);
        total[n] += y;
        back[n] += y * load(mix + n * lanes, part);
        store(sum + n * lanes, load(sum + n * lanes, part) + y * step[n], part);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      const std::int64_t at = j + n * lanes;
      const vfloat kept = total[n] - back[n];
      if (to_before) store(to_before + at, load(pending + at, part) + back[n], part);
      if (from_last) store(to_x + at, kept + load(from_last + at, part), part);
      store(pending + at, kept, part);
    }
  }
};

// Adds to `pending` what the token after a block sends back to the block's last one: Σ mix ⊙ grad.
template <class T>
void finish(const TokenShift& s, const T* grad, const float* pending, T* to_x) {
  sweep(s.channels, [&](std::int64_t j, auto part) {
    vfloat total = load(pending + j, part);
    for (std::int64_t i = 0; i < s.mixes; ++i)
      total += load(s.mix + i * s.channels + j, part) * load(grad + i * s.tokens * s.channels + j, part);
    store(to_x + j, total, part);
  });
}

// Walks forwards, which is three times as fast as backwards: a token's gradient is written when the next token's is known.
template <class T>
void backward(const TokenShift& s, const TokenShiftGrads& g, float* sums, std::int64_t begin, std::int64_t end) {
  constexpr int together = 4;
  const std::int64_t c = s.channels;
  const T* grads = static_cast<const T*>(g.grad_out);
  T* to_x = static_cast<T*>(g.grad_x);
  float* pending = sums + s.mixes * c;
  std::int64_t row = document_of(s, begin);
  for (std::int64_t token = begin; token < end; ++token) {
    while (s.starts[row + 1] <= token) ++row;
    const bool is_first = token == s.starts[row], is_last = token + 1 == s.starts[row + 1];
    T* to_before = is_first        ? static_cast<T*>(g.grad_previous) + row * c
                   : token > begin ? to_x + (token - 1) * c
                                   : nullptr;  // the block before this one writes it, see `finish`
    if (is_first) std::memset(pending, 0, c * sizeof(float));
    const Step<T> step{static_cast<const T*>(s.x) + token * c,
                       before<T>(s, token, row),
                       grads + token * c,
                       is_last ? static_cast<const T*>(g.grad_last) + row * c : nullptr,
                       to_x + token * c,
                       to_before,
                       sums,
                       pending};
    std::int64_t j = 0;
    for (; j + together * lanes <= c; j += together * lanes) step.template run<together>(s, j, Whole{});
    sweep(c - j, [&](std::int64_t k, auto part) { step.template run<1>(s, j + k, part); });
  }
  if (end < s.starts[row + 1]) finish(s, grads + end * c, pending, to_x + (end - 1) * c);
}

}  // namespace

}  // namespace ROOKERY_ISA

const TokenShiftKernels ROOKERY_ISA::token_shift{
    {forward<float>, forward<std::uint16_t>}, {backward<float>, backward<std::uint16_t>}};

}  // namespace rookery
