// What the time mixes of RWKV-5 and RWKV-6 share: a matrix for every head, a norm of what is read from it, a gate.
#pragma once

#include "kernels/wkv6.hpp"
#include "runtime/pass.hpp"

namespace rookery {

struct MatrixStateLayer {
  Norm norm, norm_heads;
  std::vector<float> bonus;  // [width]
  Projection receptance, key, value, gate;
  Matrix output;
};

class MatrixStatePass : public Pass {
 protected:
  MatrixStatePass(const Model& model, const Call& call, std::int64_t mixes, std::int64_t head_dim, float eps)
      : Pass(model, call, mixes), head_dim_(head_dim), eps_(eps) {}
  ~MatrixStatePass() = default;

  std::int64_t heads() const { return sizes_.width / head_dim_; }

  void place(Workspace& memory) override {
    for (float** x : {&r_, &k_, &v_, &gate_}) *x = memory.take(count_ * sizes_.width);
  }

  // Moves all sequences' matrices of one head past their tokens and writes what is read from them into y_. `decay`
  // [tokens, width] of the decays themselves, or [width] for all tokens where `constant`.
  void recur(const MatrixStateLayer& layer, std::size_t i, std::int64_t head, const float* decay, bool constant) const {
    const std::int64_t n = head_dim_, width = sizes_.width, channel = head * n;
    for (std::size_t row = 0; row < segments_.size(); ++row) {
      const std::int64_t first = starts_[row], at = first * width + channel;
      const float* w = decay + (constant ? channel : at);
      const Wkv6Piece piece{segments_[row].tokens, n, n, width, r_ + at, k_ + at, v_ + at, w, constant ? 0 : width,
                            layer.bonus.data() + channel, y_ + at};
      inherit(row, i, width + channel * n, n * n);
      wkv6_.advance(piece, state(row, i) + width + channel * n);
    }
  }

  void norm_head(const Norm& norm, std::int64_t head) const {
    const std::int64_t channel = head * head_dim_;
    for (std::int64_t t = 0; t < count_; ++t) {
      float* y = y_ + t * sizes_.width + channel;
      elementwise_.layer_norm(y, norm.weight.data() + channel, norm.bias.data() + channel, eps_, y, head_dim_);
    }
  }

  // y_ *= silu(gate)
  void gate_head(std::int64_t head) const {
    for (std::int64_t t = 0; t < count_; ++t) {
      const std::int64_t at = t * sizes_.width + head * head_dim_;
      elementwise_.times_silu(y_ + at, gate_ + at, head_dim_);
    }
  }

  const std::int64_t head_dim_;
  const float eps_;
  const Wkv6Kernels& wkv6_ = wkv6_kernels(model_.isa);
  float *r_, *k_, *v_, *gate_;  // [tokens, width]
};

}  // namespace rookery
