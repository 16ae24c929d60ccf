#include "core/isa.hpp"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/amx.hpp"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace rookery {

std::string_view name(Isa isa) {
  constexpr std::array<std::string_view, 7> names{"portable", "avx2", "avx512",       "amx-int8",
                                                  "amx",      "neon", "amx-imitated"};
  return names[static_cast<std::size_t>(isa)];
}

std::span<const Isa> available_isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas{Isa::portable};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("x86-64-v3")) isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
      isas.push_back(Isa::avx512);
      if (usable_amx().multiplies_bytes) isas.push_back(Isa::amx_int8);
      if (usable_amx().multiplies_pairs) isas.push_back(Isa::amx);
    }
#elif defined(__aarch64__) && defined(__linux__)
    // ARMv8.2 with products of four bytes: Graviton 2, Neoverse, Apple's and most others since 2018
    constexpr unsigned long wanted = HWCAP_ASIMDDP | HWCAP_ASIMDHP;
    if ((getauxval(AT_HWCAP) & wanted) == wanted) isas.push_back(Isa::neon);
#endif
    return isas;
  }();
  return found;
}

std::span<const Isa> imitated_isas() {
  static constexpr Isa imitated[] = {Isa::amx_imitated};
  const bool has_avx512 = std::ranges::count(available_isas(), Isa::avx512) != 0;
  return std::span(imitated).first(has_avx512 ? 1 : 0);
}

const std::string& isa_note() { return usable_amx().note; }

Isa find_isa(std::string_view wanted) {
  const auto isas = available_isas();
  if (wanted.empty()) return isas.back();
  for (const auto some : {isas, imitated_isas()})
    for (const Isa isa : some)
      if (name(isa) == wanted) return isa;
  std::string message = "no instruction set '";
  message.append(wanted).append("' on this machine; it has:");
  for (Isa isa : isas) message.append(" ").append(name(isa));
  throw std::invalid_argument(message);
}

}  // namespace rookery
