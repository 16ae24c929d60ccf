// RWKV-7 as a whole: reads tokens of any number of sequences, advances their states, gives logits where asked.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/isa.hpp"
#include "runtime/weights.hpp"
#include "runtime/workspace.hpp"

namespace rookery {

struct Rwkv7Sizes {
  std::int64_t vocab, width, layers, head_dim, hidden;
  std::int64_t decay_rank, rate_rank, value_rank, gate_rank;
  float layer_norm_eps, group_norm_eps;

  std::int64_t heads() const { return width / head_dim; }
  // Floats of a layer's state: the time mix's last input [width], the matrices [head, key, value] – value fastest, the
  // kernels' order –, the channel mix's last input [width].
  std::int64_t layer_state() const { return width * (head_dim + 2); }
  std::int64_t state() const { return layers * layer_state(); }
};

struct Norm {
  std::vector<float> weight, bias;
};

// x ↦ base + second · f(first · x)
struct LowRank {
  std::vector<float> base;
  Matrix first, second;
};

struct Rwkv7Layer {
  Norm norm_att, norm_ffn, norm_heads;
  std::vector<float> mix_att;  // [6, width]: r w k v a g
  std::vector<float> mix_ffn;
  Matrix receptance, key, value, output;
  LowRank decay, rate, residual, gate;  // no `residual` in the first layer
  std::vector<float> k_k, k_a, r_k;
  Matrix ffn_key, ffn_value;
};

// Some tokens of one sequence; `state` [Rwkv7Sizes::state()] is advanced.
struct Segment {
  float* state;
  std::int64_t tokens;
};

class Rwkv7 {
 public:
  // Tensors under their official names; those of `weights.borrowed()` must outlive the model.
  Rwkv7(const Rwkv7Sizes&, Weights& weights, Isa isa, int threads);

  // `tokens` are those of all segments one after the other. Row i of `logits` [wanted.size(), vocab] is for
  // tokens[wanted[i]]; `wanted` rises. Tokens must be less than the vocabulary. Calls may overlap if states do not.
  void forward(
      std::span<const std::int32_t> tokens, std::span<const Segment> segments, std::span<const std::int32_t> wanted,
      float* logits, int threads) const;

  const Rwkv7Sizes sizes;
  const Isa isa;
  // Columns of the second matrices of channel mixes that were read (and those that there are), over all calls.
  mutable std::atomic<std::int64_t> ffn_reads{0}, ffn_columns{0};

 private:
  friend class Rwkv7Pass;
  void read(const Rwkv7Sizes&, Weights&);

  Norm norm_in_, norm_out_;
  Matrix embedding_, head_;
  std::vector<Rwkv7Layer> layers_;
  std::vector<std::shared_ptr<std::byte[]>> copies_;
  mutable Workspaces workspaces_;
};

}  // namespace rookery
