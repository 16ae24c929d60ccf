// Products by tiles where the processor has none: every instruction that it does not know is decoded and imitated, so that
// the very instructions run that others will.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>

#include "core/amx.hpp"
#include "kernels/product.hpp"
#include "tests/check.hpp"

#define ROOKERY_ISA of_tests
#define ROOKERY_VECTOR_BYTES 16
#define ROOKERY_TILES ImitatedTiles
#include "core/tiles.hpp"

namespace rookery::tests {
namespace {

using of_tests::TileConfig;
using of_tests::TileFile;

TileFile tiles;
int imitated = 0;

// The instruction's place in memory, and the bytes from row to row.
struct Place {
  std::uint8_t* at;
  std::int64_t stride;
  int length;  // of the operand in the instruction
};

Place place_of(const std::uint8_t* modrm, int extended, const greg_t* registers, std::int64_t next) {
  constexpr int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                           REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const int mode = *modrm >> 6, rm = *modrm & 7;
  Place place{nullptr, 0, 1};
  std::int64_t at = 0;
  std::int32_t offset = 0;
  bool is_long = mode == 2;
  if (rm == 4) {
    const int sib = modrm[1], base = sib & 7, index = (sib >> 3 & 7) + (extended & 2 ? 8 : 0);
    place.length = 2;
    is_long |= mode == 0 && base == 5;
    if (mode != 0 || base != 5) at = registers[order[base + (extended & 1 ? 8 : 0)]];
    if (index != 4) place.stride = registers[order[index]] << (sib >> 6);
  } else if (mode == 0 && rm == 5) {
    is_long = true;
    at = next + 4;  // beyond the offset
  } else {
    at = registers[order[rm + (extended & 1 ? 8 : 0)]];
  }
  if (is_long) {
    std::memcpy(&offset, modrm + place.length, 4);
    place.length += 4;
  } else if (mode == 1) {
    offset = static_cast<std::int8_t>(modrm[place.length]);
    place.length += 1;
  }
  place.at = reinterpret_cast<std::uint8_t*>(at + offset);
  return place;
}

// VEX.128.0F38.W0: the prefix's last two bits, the byte after it and the operands say which instruction it is.
void imitate(int, siginfo_t*, void* context) {
  _mm_setcsr(_mm_getcsr() | 0x8040);  // subnormal numbers are zero; what was set is set again where the program goes on
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* code = reinterpret_cast<const std::uint8_t*>(machine.gregs[REG_RIP]);
  const bool is_known = code[0] == 0xc4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0;
  const int extended = ~code[1] >> 5 & 7, third = ~code[2] >> 3 & 15, prefix = code[2] & 3;
  const std::uint8_t* modrm = code + 4;
  const int mode = *modrm >> 6, first = *modrm >> 3 & 7, second = *modrm & 7;
  const auto place = [&] { return place_of(modrm, extended, machine.gregs, machine.gregs[REG_RIP] + 5); };
  int length = 1;
  if (is_known && code[3] == 0x49 && prefix == 0 && mode != 3) {
    length = place().length;
    tiles.configure(*reinterpret_cast<const TileConfig*>(place().at));
  } else if (is_known && code[3] == 0x49 && prefix == 0 && *modrm == 0xc0) {
    tiles.release();
  } else if (is_known && code[3] == 0x49 && prefix == 3 && mode == 3) {
    tiles.zero(first);
  } else if (is_known && code[3] == 0x4b && mode != 3 && second == 4 && prefix >= 2) {
    const Place there = place();
    length = there.length;
    prefix == 3 ? tiles.load(first, there.at, there.stride) : tiles.store(first, there.at, there.stride);
  } else if (is_known && code[3] == 0x5e && prefix == 2 && mode == 3) {
    tiles.multiply_bytes(first, second, third);
  } else if (is_known && code[3] == 0x5c && prefix == 2 && mode == 3) {
    tiles.multiply_pairs(first, second, third);
  } else {
    signal(SIGILL, SIG_DFL);  // another one: the program ends here
    return;
  }
  ++imitated;
  machine.gregs[REG_RIP] += 4 + length;
}

TEST(instructions_for_tiles_compute_what_others_do) {
  if (!imitated_isas().empty() && !usable_amx().multiplies_bytes) {
    struct sigaction action = {}, before;
    action.sa_sigaction = imitate;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &before);
    expect(bytes_agree(amx::product), "sums of whole numbers");
    const int of_bytes = imitated;
    expect(pairs_agree(amx::product), "sums of bfloat16 numbers");
    expect(of_bytes > 100 && imitated > of_bytes + 100, of_bytes, imitated, "instructions: others were used");
    expect(tiles.config.palette == 0, "tiles are not given back");
    sigaction(SIGILL, &before, nullptr);
  }
}

TEST(the_check_of_tiles_finds_other_sums) {
  if (imitated_isas().empty()) return;
  expect(bytes_agree(amx_imitated::product) && pairs_agree(amx_imitated::product), "imitated tiles");
  expect(bytes_agree(avx512::product), "whole numbers are those of every instruction set");
  expect(!pairs_agree(avx512::product), "pairs are added up in another order without tiles");
  ProductKernels other = amx_imitated::product;
  other.run[0][static_cast<int>(Format::int8)] = other.run[0][static_cast<int>(Format::q8_0)];
  expect(!bytes_agree(other), "other groups");

  const auto judged = [](const Amx& amx, bool bytes, bool pairs, const char* note) {
    expect(amx.multiplies_bytes == bytes && amx.multiplies_pairs == pairs, note, amx.note);
    expect(amx.note.empty() ? !*note : *note && amx.note.find(note) != std::string::npos, note, amx.note);
  };
  judged(judge_amx(false, false, other), false, false, "");
  judged(judge_amx(true, false, amx_imitated::product), false, false, "the operating system does not let this process");
  judged(judge_amx(true, true, amx_imitated::product), true, true, "");
  judged(judge_amx(true, true, avx512::product), true, false, "in another order than documented: used for 8 and 4 bits only");
  judged(judge_amx(true, true, other), false, false, "not those of this library's check: not used");
}

}  // namespace
}  // namespace rookery::tests
#endif
