// Whether this machine's AMX can be used. What it computes is compared once with what it should be, since none of it has
// run on every processor and kernel there is.
#pragma once

#include <string>

namespace rookery {

struct Amx {
  bool multiplies_bytes = false, multiplies_pairs = false;
  std::string note;  // why what the processor has is not used
};

const Amx& usable_amx();

#if defined(__x86_64__)
struct ProductKernels;
// Whether some products of packed matrices are those of the portable kernels, and those of bfloat16 ones those of imitated
// tiles.
bool bytes_agree(const ProductKernels& kernels);
bool pairs_agree(const ProductKernels& kernels);
// What may be used of a processor with these kernels.
Amx judge_amx(bool processor_has, bool kernel_keeps, const ProductKernels& kernels);
#endif

}  // namespace rookery
