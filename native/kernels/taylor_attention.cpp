// The features of query and key are made once a head; then every row of the state is read, moved, summed against the
// query and written in one pass. Lanes hold features.
#include "kernels/taylor_attention.hpp"

#include <cmath>

#include "core/math.hpp"
#include "core/scratch.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

using std::int64_t;

template <class T>
void widen(const T* x, int64_t count, float* out) {
  sweep(count, [&](int64_t j, auto part) { store(out + j, load(x + j, part), part); });
}

// φ(x) for `key` channels: 1, x / d^¼, then for every i its products with x_i … x_{d−1}.
void features(const float* x, int64_t key, float* out) {
  const float root = 1.0f / std::sqrt(static_cast<float>(key)), fourth = std::sqrt(root);
  *out++ = 1.0f;
  for (int64_t i = 0; i < key; ++i) *out++ = x[i] * fourth;
  for (int64_t i = 0; i < key; ++i) {
    const float scaled = x[i] * root;
    *out++ = x[i] * scaled * 0.70710678f;
    for (int64_t j = i + 1; j < key; ++j) *out++ = scaled * x[j];
  }
}

// before + value · keys into after; its product with the queries.
float move_row(const float* before, float* after, float value, const float* keys, const float* queries, int64_t size) {
  vfloat total{};
  sweep(size, [&](int64_t j, auto part) {
    const vfloat s = load(before + j, part) + value * load(keys + j, part);
    store(after + j, s, part);
    total += s * load(queries + j, part);
  });
  return sum(total);
}

template <class T>
void step(const TaylorStep& in, int64_t begin, int64_t end) {
  const int64_t size = taylor_features(in.key), rows = in.value + 1, most = in.key > in.value ? in.key : in.value;
  float* queries = scratch(2 * size + 2 * most);
  float *keys = queries + size, *room = keys + size, *made = room + most;
  for (int64_t head = begin; head < end; ++head) {
    widen(static_cast<const T*>(in.q) + head * in.key, in.key, room);
    features(room, in.key, queries);
    widen(static_cast<const T*>(in.k) + head * in.key, in.key, room);
    features(room, in.key, keys);
    widen(static_cast<const T*>(in.v) + head * in.value, in.value, room);
    const float* before = in.state + head * rows * size;
    float* after = in.after + head * rows * size;
    const float whole =
        move_row(before + in.value * size, after + in.value * size, 1.0f, keys, queries, size);
    for (int64_t m = 0; m < in.value; ++m)
      made[m] = move_row(before + m * size, after + m * size, room[m], keys, queries, size) / whole;
    T* y = static_cast<T*>(in.y) + head * in.value;
    sweep(in.value, [&](int64_t j, auto part) { store(y + j, load(made + j, part), part); });
  }
}

}  // namespace

}  // namespace ROOKERY_ISA

const TaylorAttentionKernels ROOKERY_ISA::taylor_attention{{step<float>, step<std::uint16_t>}};

}  // namespace rookery
