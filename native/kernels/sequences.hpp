// Where the rows, heads and tokens of a call of a recurrence lie.
#pragma once

#include <cstdint>

namespace rookery {

// A tensor of tokens × heads × channels, float32 or bfloat16; no data: zeros.
struct HeadTensor {
  void* data = nullptr;
  bool bfloat16 = false;
};

// `rows` sequences: row i has the tokens starts[i] … starts[i + 1] − 1. `key` and `value` are multiples of 16.
struct HeadShape {
  std::int64_t rows, heads, key, value;
  const std::int64_t* starts;  // [rows + 1]
  const std::int64_t* chunks;  // [rows], place of each row's first checkpoint
};

}  // namespace rookery
