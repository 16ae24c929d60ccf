#include "runtime/rwkv6.hpp"

#include <array>
#include <cmath>

namespace rookery {

using std::int64_t;

namespace {

// Places of the mixed inputs, in the order in which the low-rank factors hold them.
struct Order6 {
  int64_t r, w, k, v, g, count;
};

bool has_one_norm(char variant) { return variant == 'b' || variant == 'c'; }

Order6 order_of(char variant) {
  return has_one_norm(variant) ? Order6{0, 3, 1, 2, -1, 4} : Order6{3, 0, 1, 2, 4, 5};
}

}  // namespace

Rwkv6::Rwkv6(const Sizes& given, const Rwkv6Sizes& own, Weights& weights, Isa wanted, int threads)
    : Model(given, wanted), own_(own) {
  Reader reader(weights, sizes.width);
  read_ends(reader);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    read_time_mix(reader, i);
    read_channel_mix(reader, i, {"time_maa_k", "time_maa_r"}, false);
  }
  finish(weights, threads);
}

void Rwkv6::read_time_mix(Reader& reader, int64_t i) {
  const int64_t width = sizes.width, ranks = order_of(own_.variant).count * own_.mix_rank;
  Rwkv6Layer& layer = layers_.emplace_back();
  reader.leave();
  layer.norm = reader.norm("blocks." + std::to_string(i) + ".ln1");
  reader.enter(i, "att");
  layer.mix = reader.vector("time_maa_x");
  const bool one_norm = has_one_norm(own_.variant);
  layer.signals = one_norm
                      ? reader.mixes({"time_maa_r", "time_maa_k", "time_maa_v", "time_maa_w"})
                      : reader.mixes({"time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g"});
  const std::string factors = one_norm ? "time_maa_rkvw_w" : "time_maa_w";
  layer.moved.first = reader.first_factor(factors + "1", ranks);
  layer.moved.second = reader.weights.borrow(reader.at() + factors + "2", Order::columns, width, ranks);
  layer.decay = {reader.vector("time_decay"), reader.first_factor("time_decay_w1", own_.decay_rank),
                 reader.second_factor("time_decay_w2", own_.decay_rank, own_.head_dim)};
  layer.bonus = reader.vector("time_faaaa");
  layer.receptance = reader.projection("receptance.weight", width, width);
  layer.key = reader.projection("key.weight", width, width);
  layer.value = reader.projection("value.weight", width, width);
  layer.output = reader.matrix("output.weight", width, width);
  layer.norm_heads = reader.norm("ln_x");
  if (own_.variant == 0) layer.gate = reader.projection("gate.weight", width, width);
  if (own_.variant == 'a') {
    layer.low_gate.first = reader.first_factor("gate_w1", own_.gate_rank);
    layer.low_gate.second = reader.second_factor("gate_w2", own_.gate_rank, own_.head_dim);
  }
}

class Rwkv6Pass final : public MatrixStatePass {
 public:
  Rwkv6Pass(const Rwkv6& model, const Call& call)
      : MatrixStatePass(model, call, 5, model.own_.head_dim, model.own_.group_norm_eps), layers_(model.layers_),
        own_(model.own_), order_(order_of(own_.variant)) {}

 private:
  void place(Workspace& memory) override {
    MatrixStatePass::place(memory);
    decay_ = memory.take(count_ * sizes_.width);
    low_mix_ = memory.take(count_ * order_.count * own_.mix_rank);
    low_decay_ = memory.take(count_ * own_.decay_rank);
    low_gate_ = memory.take(own_.variant == 'a' ? count_ * own_.gate_rank : 0);
  }

  void time_mix(std::size_t i) override {
    const Rwkv6Layer& layer = layers_[i];
    shift(i, layer.norm, layer.mix, 0);
    interpolate(layer);

    std::array<Job, 5> jobs{job(layer.receptance, order_.r, r_), job(layer.key, order_.k, k_),
                            job(layer.value, order_.v, v_),
                            job(layer.decay.first, order_.w, low_decay_, elementwise_.hyperbolic_tangent)};
    if (own_.variant == 0) jobs[4] = job(layer.gate, order_.g, gate_);
    if (own_.variant == 'a') jobs[4] = job(layer.low_gate.first, order_.g, low_gate_, elementwise_.hyperbolic_tangent);
    side_by_side(std::span(jobs).first(has_one_norm(own_.variant) ? 4 : 5));

    shared_out(heads(), 1, task_bytes, [&](Range range) {
      for (int64_t head = range.begin; head < range.end; ++head) {
        decays(layer, head);
        recur(layer, i, head, decay_, false);
        if (!has_one_norm(own_.variant)) norm_head(layer.norm_heads, head);
        if (own_.variant == 0) gate_head(head);
        if (own_.variant == 'a') low_rank_gate(layer, head);
      }
    });
    if (has_one_norm(own_.variant)) norm_all(layer.norm_heads);
    add_output(layer.output);
  }

  // From what the token itself says, and the one before it, to the inputs of the projections.
  void interpolate(const Rwkv6Layer& layer) {
    const int64_t width = sizes_.width, rank = own_.mix_rank, ranks = order_.count * rank;
    const Job first = job(layer.moved.first, 0, low_mix_, elementwise_.hyperbolic_tangent);
    side_by_side({&first, 1});
    shared_out(width, 16, layer.moved.second.bytes_of_output(), [&](Range range) {
      for (int64_t signal = 0; signal < order_.count; ++signal) {
        Matrix second = layer.moved.second;
        second.in = rank;
        second.data = static_cast<const std::byte*>(second.data) + static_cast<std::size_t>(signal) * second.bytes();
        float* mixed = mixed_ + signal * count_ * width;
        multiply(second, dense(low_mix_ + signal * rank, ranks, mixed, width), range);
        for (std::size_t row = 0; row < segments_.size(); ++row)
          for (int64_t t = starts_[row]; t < starts_[row + 1]; ++t) {
            const float* x = normed_ + t * width;
            const float* before = t > starts_[row] ? x - width : previous_ + static_cast<int64_t>(row) * width;
            elementwise_.interpolate(
                x + range.begin, before + range.begin, layer.signals.data() + signal * width + range.begin,
                mixed + t * width + range.begin, range.end - range.begin);
          }
      }
    });
  }

  // One head's decays, and its keys where these depend on them.
  void decays(const Rwkv6Layer& layer, int64_t head) const {
    second_factor(layer.decay, head, low_decay_, decay_);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * sizes_.width + head * head_dim_;
      float *w = decay_ + at, *k = k_ + at;
      if (own_.damp_keys)
        for (int64_t j = 0; j < head_dim_; ++j) k[j] *= std::exp(std::min(w[j], 0.0f));
      elementwise_.decay(w, head_dim_);
      if (own_.variant == 'c')
        for (int64_t j = 0; j < head_dim_; ++j) k[j] *= 1.0f - w[j];
    }
  }

  void low_rank_gate(const Rwkv6Layer& layer, int64_t head) const {
    second_factor(layer.low_gate, head, low_gate_, gate_);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * sizes_.width + head * head_dim_;
      for (int64_t j = 0; j < head_dim_; ++j) y_[at + j] *= gate_[at + j];
    }
  }

  // Variants b and c normalise all heads together.
  void norm_all(const Norm& norm) const {
    const int64_t width = sizes_.width;
    by_tokens([&](Range range) {
      for (int64_t t = range.begin; t < range.end; ++t)
        elementwise_.layer_norm(y_ + t * width, norm.weight.data(), norm.bias.data(), eps_, y_ + t * width, width);
    });
  }

  const std::vector<Rwkv6Layer>& layers_;
  const Rwkv6Sizes& own_;
  const Order6 order_;
  float *decay_, *low_mix_, *low_decay_, *low_gate_;  // [tokens, width]; [tokens, rank]
};

void Rwkv6::run(const Call& call, Workspace& memory) const { Rwkv6Pass(*this, call).run(memory); }

}  // namespace rookery
