// Which instruction sets this build has, which of them the machine can run, and the choice among them.
#pragma once

#include <span>
#include <string>
#include <string_view>

namespace rookery {

// `amx_int8` and `amx` are AVX-512 with products by tiles: of packed matrices only, or of bfloat16 ones, too.
// `amx_imitated` is `amx` without such a processor.
enum class Isa { portable, avx2, avx512, amx_int8, amx, neon, amx_imitated };

std::string_view name(Isa isa);
// Instruction sets that were compiled in and that this machine runs, the best one last.
std::span<const Isa> available_isas();
// Those that are never chosen, only named: slow ones that compute what others do.
std::span<const Isa> imitated_isas();
// The set of that name; "" means the best. Throws std::invalid_argument that lists what there is.
Isa find_isa(std::string_view wanted);
// Why a set that the processor has is not used; "" if there is none.
const std::string& isa_note();

}  // namespace rookery

// Declares `TABLE` (a struct of function pointers) once per instruction set, and `INSTANCE_kernels(isa)` to choose.
// Each kernel file defines `const TABLE ROOKERY_ISA::INSTANCE`.
#if defined(__x86_64__)
#define ROOKERY_DECLARE_KERNELS(TABLE, INSTANCE)                    \
  namespace portable { extern const TABLE INSTANCE; }               \
  namespace avx2 { extern const TABLE INSTANCE; }                   \
  namespace avx512 { extern const TABLE INSTANCE; }                 \
  inline const TABLE& INSTANCE##_kernels(Isa isa) {                 \
    if (isa == Isa::portable) return portable::INSTANCE;            \
    if (isa == Isa::avx2) return avx2::INSTANCE;                    \
    return avx512::INSTANCE;                                        \
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
