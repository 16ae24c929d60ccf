// RWKV-5: 5.0, 5.1 and 5.2.
#pragma once

#include "runtime/matrix_state.hpp"

namespace rookery {

struct Rwkv5Sizes {
  std::int64_t head_dim;
  float group_norm_eps;
  bool has_gate;   // 5.0 has none
  bool per_head;   // a decay and a bonus for every head, not for every channel
  bool log_bonus;  // the bonus is `time_first`, its logarithm
};

struct Rwkv5Layer : MatrixStateLayer {
  std::vector<float> mix;    // [3 or 4, width]: k v r g
  std::vector<float> decay;  // [width]
};

class Rwkv5 : public Model {
 public:
  Rwkv5(const Sizes&, const Rwkv5Sizes&, Weights& weights, Isa isa, int threads);

 private:
  friend class Rwkv5Pass;
  void read_time_mix(Reader&, std::int64_t layer);
  void run(const Call&, Workspace&) const override;

  Rwkv5Sizes own_;
  std::vector<Rwkv5Layer> layers_;
};

}  // namespace rookery
