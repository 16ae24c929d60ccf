// RWKV-6: x060 and its variants a, b, c.
#pragma once

#include "runtime/matrix_state.hpp"

namespace rookery {

struct Rwkv6Sizes {
  std::int64_t head_dim, mix_rank, decay_rank, gate_rank;
  float group_norm_eps;
  char variant;    // 0 for x060, or its letter
  bool damp_keys;  // keys are multiplied by e^min(raw decay, 0)
};

struct Rwkv6Layer : MatrixStateLayer {
  std::vector<float> mix;      // [width], of the input that chooses how the others are mixed
  std::vector<float> signals;  // [signals, width]
  LowRank moved;               // what is added to `signals`; the second factor is one [rank, width] for each
  LowRank decay, low_gate;
};

class Rwkv6 : public Model {
 public:
  Rwkv6(const Sizes&, const Rwkv6Sizes&, Weights& weights, Isa isa, int threads);

 private:
  friend class Rwkv6Pass;
  void read_time_mix(Reader&, std::int64_t layer);
  void run(const Call&, Workspace&) const override;

  Rwkv6Sizes own_;
  std::vector<Rwkv6Layer> layers_;
};

}  // namespace rookery
