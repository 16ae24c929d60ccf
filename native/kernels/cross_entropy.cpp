#include "kernels/cross_entropy.hpp"

#include <cmath>

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

template <class T>
float largest_of(const T* row, std::int64_t count) {
  vfloat most = splat(-INFINITY);
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const vfloat x = load(row + j);
    most = x > most ? x : most;
  }
  float result = most[0];
  for (int lane = 1; lane < lanes; ++lane) result = most[lane] > result ? most[lane] : result;
  for (; j < count; ++j) {
    T buffer[lanes] = {row[j]};
    const float x = load(buffer)[0];
    result = x > result ? x : result;
  }
  return result;
}

template <class T>
inline float value_of(const T* p) {
  T buffer[lanes] = {*p};
  return load(buffer)[0];
}

// Σ e^(x − largest), and how often the largest value occurs.
struct Total {
  float exps, ties;
};

template <class T>
Total total_of(const T* row, std::int64_t count, float largest) {
  vfloat exps{}, ties{};
  std::int64_t j = 0;
  for (; j + lanes <= count; j += lanes) {
    const vfloat x = load(row + j);
    exps += exp(x - largest);
    ties += x == splat(largest) ? splat(1.0f) : vfloat{};
  }
  Total total{sum(exps), sum(ties)};
  for (; j < count; ++j) {
    const float x = value_of(row + j);
    total.exps += exp(splat(x - largest))[0];
    total.ties += x == largest ? 1.0f : 0.0f;
  }
  return total;
}

template <class T, bool with_gradient>
void run(const CrossEntropy& c, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) {
    T* row = static_cast<T*>(c.logits) + i * c.vocabulary;
    const std::int64_t target = c.targets[i];
    const bool counts = target != c.ignored;
    const float largest = largest_of(row, c.vocabulary);
    const Total total = total_of(row, c.vocabulary, largest);
    const float chosen = counts ? value_of(row + target) : 0.0f;
    c.losses[i] = counts ? std::log(total.exps) + (largest - chosen) : 0.0f;
    if constexpr (with_gradient) {
      const float scale = counts ? c.scale : 0.0f, share = scale / total.exps, pull = c.pull * largest / total.ties;
      sweep(c.vocabulary, [&](std::int64_t j, auto part) {
        const vfloat x = load(row + j, part);
        store(row + j, exp(x - largest) * share + (x == splat(largest) ? splat(pull) : vfloat{}), part);
      });
      if (counts) {
        // from the float32 value, not from the stored one: softmax − 1 must not be rounded twice
        T buffer[lanes];
        store(buffer, exp(splat(chosen - largest)) * share - scale + (chosen == largest ? pull : 0.0f));
        row[target] = buffer[0];
      }
    }
  }
}

}  // namespace

}  // namespace ROOKERY_ISA

const CrossEntropyKernels ROOKERY_ISA::cross_entropy{
    {run<float, false>, run<std::uint16_t, false>}, {run<float, true>, run<std::uint16_t, true>}};

}  // namespace rookery
