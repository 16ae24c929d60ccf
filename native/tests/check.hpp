// A test is a function that registers itself; what it expects and does not find is printed, and makes the program fail.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "core/isa.hpp"
#include "core/matrix.hpp"

namespace rookery::tests {

struct Test {
  const char* name;
  std::function<void()> run;
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int failures = 0;

// `what` is printed only where it fails.
template <class... What>
void expect(bool holds, const What&... what) {
  if (holds) return;
  ++failures;
  if (failures > 20) return;
  std::cout << "  not so: ";
  ((std::cout << what << ' '), ...) << '\n';
}

struct Registered {
  Registered(const char* name, std::function<void()> run) { tests().push_back({name, std::move(run)}); }
};

// TEST(name) { … }
#define TEST(NAME)                                        \
  static void NAME();                                     \
  static const Registered registered_##NAME(#NAME, NAME); \
  static void NAME()

// Instruction sets that this machine runs, those among them that others compute for it.
inline std::vector<Isa> every_isa() {
  std::vector<Isa> all(available_isas().begin(), available_isas().end());
  all.insert(all.end(), imitated_isas().begin(), imitated_isas().end());
  return all;
}

// Memory of exactly the size asked for, so that sanitizers see a step beyond it.
using Floats = std::vector<float>;
using Halves = std::vector<std::uint16_t>;

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  float normal(float scale = 1) { return scale * std::normal_distribution<float>()(engine_); }
  int below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(engine_); }
  Floats normals(std::int64_t count, float scale = 1) {
    Floats x(static_cast<std::size_t>(count));
    for (float& v : x) v = normal(scale);
    return x;
  }

 private:
  std::mt19937 engine_;
};

inline float widened(std::uint16_t bits, Format format) {
  if (format == Format::bfloat16) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof x);
    return x;
  }
  const int exponent = bits >> 10 & 31;
  const float size = std::ldexp(static_cast<float>(1024 | (bits & 1023)), exponent - 25);
  return bits >> 15 ? -size : size;
}

// Numbers of a format, and what they are. Exponents of float16 stay normal.
struct Stored {
  Format format = Format::float32;
  Floats values;
  Halves halves;

  const void* data() const {
    return format == Format::float32 ? static_cast<const void*>(values.data()) : halves.data();
  }
};

inline Stored stored(Random& random, std::int64_t count, Format format, float scale = 1) {
  Stored all{format, random.normals(count, scale), {}};
  if (format == Format::float32) return all;
  for (float& x : all.values) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const auto exponent = static_cast<std::uint16_t>(8 + random.below(8));
    const auto fraction = static_cast<std::uint16_t>(random.below(1024));
    const auto half = format == Format::bfloat16
                          ? static_cast<std::uint16_t>(bits >> 16)
                          : static_cast<std::uint16_t>((bits >> 31) << 15 | exponent << 10 | fraction);
    all.halves.push_back(half);
    x = widened(half, format);
  }
  return all;
}

inline bool same(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Greatest difference, in units of `scale`.
template <class A, class B>
double apart(const A& a, const B& b, double scale = 1) {
  double most = a.size() == b.size() ? 0 : 1e30;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    most = std::max(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])) / scale);
  return most;
}

}  // namespace rookery::tests
