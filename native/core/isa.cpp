#include "core/isa.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rookery {

std::string_view name(Isa isa) {
  constexpr std::array<std::string_view, 4> names{"portable", "avx2", "avx512", "neon"};
  return names[static_cast<std::size_t>(isa)];
}

std::span<const Isa> available_isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas{Isa::portable};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("x86-64-v3")) isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
      isas.push_back(Isa::avx512);
#elif defined(__aarch64__) && defined(__linux__)
    // ARMv8.2 with products of four bytes: Graviton 2, Neoverse, Apple's and most others since 2018
    constexpr unsigned long wanted = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
    if ((getauxval(AT_HWCAP) & wanted) == wanted) isas.push_back(Isa::neon);
#endif
    return isas;
  }();
  return found;
}

Isa find_isa(std::string_view wanted) {
  const auto isas = available_isas();
  if (wanted.empty()) return isas.back();
  const auto match = std::ranges::find(isas, wanted, [](Isa isa) { return name(isa); });
  if (match != isas.end()) return *match;
  std::string message = "no instruction set '";
  message.append(wanted).append("' on this machine; it has:");
  for (Isa isa : isas) message.append(" ").append(name(isa));
  throw std::invalid_argument(message);
}

}  // namespace rookery
