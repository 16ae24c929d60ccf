// RWKV-4.
#pragma once

#include "runtime/model.hpp"

namespace rookery {

struct Rwkv4Layer {
  Norm norm;
  std::vector<float> mix;           // [3, width]: k v r
  std::vector<float> log_w, bonus;  // [width]
  Projection receptance, key, value;
  Matrix output;
};

// The recurrent state of a block is [3, width]: the two sums and their exponent.
class Rwkv4 : public Model {
 public:
  Rwkv4(const Sizes&, Weights& weights, Isa isa, int threads);

  void begin(float* state) const override;

 private:
  friend class Rwkv4Pass;
  void read_time_mix(Reader&, std::int64_t layer);
  void run(const Call&, Workspace&) const override;

  std::vector<Rwkv4Layer> layers_;
};

}  // namespace rookery
