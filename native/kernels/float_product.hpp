// What products with matrices of floats share, by rows and by columns.
#pragma once

#include "core/matrix.hpp"
#include "core/simd.hpp"

namespace rookery {
namespace ROOKERY_ISA {

constexpr int line = 64;  // bytes

template <class T>
const T* weights(const Matrix& w) {
  return static_cast<const T*>(w.data);
}

// Writes a vector, or what `part` says of it, or adds it to what is there.
template <class... P>
inline void put(float* y, vfloat value, bool add, P... part) {
  store(y, add ? load(y, part...) + value : value, part...);
}

}  // namespace ROOKERY_ISA
}  // namespace rookery
