// RWKV-7.
#pragma once

#include "runtime/model.hpp"

namespace rookery {

struct Rwkv7Sizes {
  std::int64_t head_dim;
  std::int64_t decay_rank, rate_rank, value_rank, gate_rank;
  float group_norm_eps;
};

struct Rwkv7Layer {
  Norm norm, norm_heads;
  std::vector<float> mix;  // [6, width]: r w k v a g
  Projection receptance, key, value;
  Matrix output;
  LowRank decay, rate, residual, gate;  // no `residual` in the first layer
  std::vector<float> k_k, k_a, r_k;
};

class Rwkv7 : public Model {
 public:
  // Tensors under their official names; those of `weights.borrowed()` must outlive the model.
  Rwkv7(const Sizes&, const Rwkv7Sizes&, Weights& weights, Isa isa, int threads);

 private:
  friend class Rwkv7Pass;
  void read_time_mix(Reader&, std::int64_t layer);
  void run(const Call&, Workspace&) const override;

  Rwkv7Sizes own_;
  std::vector<Rwkv7Layer> layers_;
};

}  // namespace rookery
