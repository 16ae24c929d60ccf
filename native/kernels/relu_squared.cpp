#include "kernels/relu_squared.hpp"

#include "core/math.hpp"

namespace rookery {
namespace ROOKERY_ISA {
namespace {

// not a number stays one
inline vfloat positive(vfloat x) { return x < vfloat{} ? vfloat{} : x; }

template <class T>
void forward(const void* x, void* y, std::int64_t begin, std::int64_t end) {
  const T* in = static_cast<const T*>(x) + begin;
  T* out = static_cast<T*>(y) + begin;
  sweep(end - begin, [&](std::int64_t j, auto part) {
    const vfloat kept = positive(load(in + j, part));
    store(out + j, kept * kept, part);
  });
}

template <class T>
void backward(const void* x, const void* grad_y, void* grad_x, std::int64_t begin, std::int64_t end) {
  const T* in = static_cast<const T*>(x) + begin;
  const T* grad = static_cast<const T*>(grad_y) + begin;
  T* out = static_cast<T*>(grad_x) + begin;
  sweep(end - begin, [&](std::int64_t j, auto part) {
    store(out + j, 2.0f * positive(load(in + j, part)) * load(grad + j, part), part);
  });
}

}  // namespace

}  // namespace ROOKERY_ISA

const ReluSquaredKernels ROOKERY_ISA::relu_squared{
    {forward<float>, forward<std::uint16_t>}, {backward<float>, backward<std::uint16_t>}};

}  // namespace rookery
