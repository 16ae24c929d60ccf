// What the bindings of the recurrences share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "bindings/rows.hpp"
#include "kernels/sequences.hpp"

namespace rookery {

using Tensor = std::pair<Address, bool>;   // data_ptr() and whether it is bfloat16 (else float32)
using Starts = std::vector<std::int64_t>;  // [rows + 1], first token of each row, and the number of tokens

inline HeadTensor head_tensor(const Tensor& given) { return {at<void>(given.first), given.second}; }

// Where the checkpoints of each row start; every row starts a chunk of its own.
inline std::vector<std::int64_t> first_chunks(const Starts& starts, std::int64_t chunk) {
  std::vector<std::int64_t> chunks{0};
  for (std::size_t row = 0; row + 1 < starts.size(); ++row)
    chunks.push_back(chunks.back() + (starts[row + 1] - starts[row] + chunk - 1) / chunk);
  return chunks;
}

}  // namespace rookery
