// Which instruction sets this build has, which of them the machine can run, and the choice among them.
#pragma once

#include <span>
#include <string_view>

namespace rookery {

enum class Isa { portable, avx2, avx512, neon };

// Names in ascending order of preference; those of another architecture are left out.
std::string_view name(Isa isa);
// Instruction sets that were compiled in and that this machine runs, the best one last.
std::span<const Isa> available_isas();
// The set of that name; "" means the best. Throws std::invalid_argument that lists what there is.
Isa find_isa(std::string_view wanted);

}  // namespace rookery

// Declares `TABLE` (a struct of function pointers) once per instruction set, and `kernels_of<TABLE>(isa)` to choose.
// Each kernel file defines `const TABLE ROOKERY_ISA::INSTANCE`.
#if defined(__x86_64__)
#define ROOKERY_DECLARE_KERNELS(TABLE, INSTANCE)                    \
  namespace portable { extern const TABLE INSTANCE; }               \
  namespace avx2 { extern const TABLE INSTANCE; }                   \
  namespace avx512 { extern const TABLE INSTANCE; }                 \
  inline const TABLE& INSTANCE##_kernels(Isa isa) {                 \
    if (isa == Isa::avx512) return avx512::INSTANCE;                \
    if (isa == Isa::avx2) return avx2::INSTANCE;                    \
    return portable::INSTANCE;                                      \
  }
#elif defined(__aarch64__)
#define ROOKERY_DECLARE_KERNELS(TABLE, INSTANCE)                    \
  namespace portable { extern const TABLE INSTANCE; }               \
  namespace neon { extern const TABLE INSTANCE; }                   \
  inline const TABLE& INSTANCE##_kernels(Isa isa) {                 \
    return isa == Isa::neon ? neon::INSTANCE : portable::INSTANCE;  \
  }
#else
#define ROOKERY_DECLARE_KERNELS(TABLE, INSTANCE)                    \
  namespace portable { extern const TABLE INSTANCE; }               \
  inline const TABLE& INSTANCE##_kernels(Isa) { return portable::INSTANCE; }
#endif
