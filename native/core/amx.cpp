#include "core/amx.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/packing.hpp"
#include "kernels/prepared.hpp"
#include "kernels/product.hpp"

namespace rookery {
namespace {

using std::int64_t;

bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24, int8 = 1u << 25;
  return (d & (bfloat16 | tile | int8)) == (bfloat16 | tile | int8);
}

// The kernel keeps the 8 KB of tiles only for processes that ask for it.
bool kernel_keeps_tiles() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// Numbers that look like any, the same ones everywhere; some so small that their products are subnormal.
struct Numbers {
  std::uint32_t state = 1;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    const float number = static_cast<float>(static_cast<std::int32_t>(state)) / 2147483648.0f;
    return state % 61 ? number : number * 1e-37f;
  }
};

constexpr int64_t outputs = 37, inputs = 168;  // neither fills its last tile

std::vector<float> products(const ProductKernels& kernels, const Matrix& matrix, int64_t tokens) {
  Numbers next{7};
  std::vector<float> x(static_cast<std::size_t>(tokens * matrix.in)), y(static_cast<std::size_t>(tokens * matrix.out));
  for (float& number : x) number = next();
  Product product{x.data(), matrix.in, y.data(), matrix.out, tokens};
  std::vector<float> memory(static_cast<std::size_t>(prepared_floats(tokens, matrix.in)));
  prepare(kernels, matrix, product, memory.data());
  fill(kernels, product, 0, matrix.in, 0, tokens);
  kernels.run[static_cast<int>(matrix.order)][static_cast<int>(matrix.format)](matrix, product, 0, matrix.out);
  return y;
}

bool agree(const ProductKernels& kernels, const ProductKernels& others, const Matrix& matrix) {
  for (const int64_t tokens : {1, 5, 16, 43}) {
    const auto y = products(kernels, matrix, tokens), z = products(others, matrix, tokens);
    if (std::memcmp(y.data(), z.data(), y.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace

bool bytes_agree(const ProductKernels& kernels) {
  std::vector<float> weights(outputs * inputs);
  Numbers next;
  for (float& weight : weights) weight = next();
  const Matrix from{weights.data(), Format::float32, Order::rows, outputs, inputs};
  for (const Format format : {Format::int8, Format::int4})
    for (const Order order : {Order::rows, Order::columns}) {
      Matrix matrix{nullptr, format, order, outputs, inputs};
      const Packing how = packing(format);
      std::vector<std::uint8_t> bytes(matrix.bytes());
      matrix.data = bytes.data();
      const int64_t units = order == Order::rows ? how.panels(outputs) : how.groups(inputs);
      portable::packing.pack(from, format, order, 0, units, bytes.data());
      if (!agree(kernels, portable::product, matrix)) return false;
    }
  return true;
}

bool pairs_agree(const ProductKernels& kernels) {
  std::vector<std::uint16_t> weights(outputs * inputs);
  Numbers next;
  for (std::uint16_t& weight : weights) {
    const float number = next();
    std::uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    weight = static_cast<std::uint16_t>(bits >> 16);
  }
  for (const Order order : {Order::rows, Order::columns})
    if (!agree(kernels, amx_imitated::product, {weights.data(), Format::bfloat16, order, outputs, inputs}))
      return false;
  return true;
}

Amx judge_amx(bool processor_has, bool kernel_keeps, const ProductKernels& kernels) {
  Amx result;
  if (!processor_has) return result;
  if (!kernel_keeps) {
    result.note = "the processor has AMX, but the operating system does not let this process use it";
    return result;
  }
  result.multiplies_bytes = bytes_agree(kernels);
  result.multiplies_pairs = result.multiplies_bytes && pairs_agree(kernels);
  if (!result.multiplies_bytes)
    result.note = "the processor has AMX, but its sums of whole numbers are not those of this library's check: not used";
  else if (!result.multiplies_pairs)
    result.note = "the processor's AMX adds up bfloat16 numbers in another order than documented: used for 8 and 4 bits only";
  return result;
}

const Amx& usable_amx() {
  static const Amx found = [] {
    const bool has = processor_has_tiles();
    return judge_amx(has, has && kernel_keeps_tiles(), amx::product);
  }();
  return found;
}

const ProductKernels& product_kernels(Isa isa) {
  // tiles for packed matrices, AVX-512 for floats; inputs are prepared alike
  static const ProductKernels only_bytes = [] {
    ProductKernels kernels = amx::product;
    for (int order = 0; order < order_count; ++order)
      std::copy_n(avx512::product.run[order], float_format_count, kernels.run[order]);
    return kernels;
  }();
  switch (isa) {
    case Isa::portable: return portable::product;
    case Isa::avx2: return avx2::product;
    case Isa::amx_int8: return only_bytes;
    case Isa::amx: return amx::product;
    case Isa::amx_imitated: return amx_imitated::product;
    default: return avx512::product;
  }
}

}  // namespace rookery
#else
namespace rookery {

const Amx& usable_amx() {
  static const Amx none;
  return none;
}

}  // namespace rookery
#endif
