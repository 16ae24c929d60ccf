// Low-rank changes of a model's matrices, which stay beside them: y = W x + B (A x). Many may share one model, each for
// tokens of its own.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/matrix.hpp"

namespace rookery {

class Model;

struct LowRankChange {
  Matrix first, second;  // A [rank, in] by rows, B [out, rank] by columns: both are read along their long side
};

class Adapter {
 public:
  // Numbers of the caller, which are copied: A [rank, in], and B turned, [rank, out].
  struct Factors {
    const float *a, *b;
    std::int64_t rank, out, in;
  };

  // `factors` by the names of the model's tensors; throws std::invalid_argument where one has none that fits.
  Adapter(const Model& model, const std::map<std::string, Factors>& factors);

  // What changes a matrix of the model, null where nothing does.
  const LowRankChange* of(const Matrix& matrix) const {
    const auto found = changes_.find(matrix.data);
    return found == changes_.end() ? nullptr : &found->second;
  }
  std::int64_t largest_rank() const { return largest_rank_; }
  bool is_for(const Model& model) const { return model_ == &model; }

 private:
  const Model* model_;
  std::unordered_map<const void*, LowRankChange> changes_;  // by where the matrices' weights lie
  std::vector<std::vector<float>> numbers_;
  std::int64_t largest_rank_ = 0;
};

}  // namespace rookery
