#include "runtime/rwkv5.hpp"

#include <array>
#include <cmath>

namespace rookery {

using std::int64_t;

namespace {

enum Mix { of_k, of_v, of_r, of_g };

}  // namespace

Rwkv5::Rwkv5(const Sizes& given, const Rwkv5Sizes& own, Weights& weights, Isa wanted, int threads)
    : Model(given, wanted), own_(own) {
  Reader reader(weights, sizes.width);
  read_ends(reader);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    read_time_mix(reader, i);
    read_channel_mix(reader, i, {"time_mix_k", "time_mix_r"}, true);
  }
  finish(weights, threads);
}

void Rwkv5::read_time_mix(Reader& reader, int64_t i) {
  const int64_t width = sizes.width;
  Rwkv5Layer& layer = layers_.emplace_back();
  reader.leave();
  layer.norm = reader.norm("blocks." + std::to_string(i) + ".ln1");
  reader.enter(i, "att");
  layer.mix = own_.has_gate ? reader.mixes({"time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g"}, true)
                            : reader.mixes({"time_mix_k", "time_mix_v", "time_mix_r"}, true);
  layer.receptance = reader.projection("receptance.weight", width, width);
  layer.key = reader.projection("key.weight", width, width);
  layer.value = reader.projection("value.weight", width, width);
  if (own_.has_gate) layer.gate = reader.projection("gate.weight", width, width);
  layer.output = reader.matrix("output.weight", width, width);
  layer.norm_heads = reader.norm("ln_x");
  const auto per_channel = [&](const char* name, auto&& function) {
    const int64_t share = own_.per_head ? own_.head_dim : 1;
    const auto stored = reader.vector(name, width / share);
    std::vector<float> values(static_cast<std::size_t>(width));
    for (std::size_t j = 0; j < values.size(); ++j)
      values[j] = static_cast<float>(function(double{stored[j / static_cast<std::size_t>(share)]}));
    return values;
  };
  layer.decay = per_channel("time_decay", [](double x) { return std::exp(-std::exp(x)); });
  layer.bonus = own_.log_bonus ? per_channel("time_first", [](double x) { return std::exp(x); })
                               : per_channel("time_faaaa", [](double x) { return x; });
}

class Rwkv5Pass final : public MatrixStatePass {
 public:
  Rwkv5Pass(const Rwkv5& model, const Call& call)
      : MatrixStatePass(model, call, 4, model.own_.head_dim, model.own_.group_norm_eps), layers_(model.layers_) {}

 private:
  void time_mix(std::size_t i) override {
    const Rwkv5Layer& layer = layers_[i];
    const bool has_gate = layer.gate.out > 0;
    shift(i, layer.norm, layer.mix, 0);
    std::array<Job, 4> jobs{job(layer.receptance, of_r, r_), job(layer.key, of_k, k_), job(layer.value, of_v, v_)};
    if (has_gate) jobs[3] = job(layer.gate, of_g, gate_);
    side_by_side(std::span(jobs).first(has_gate ? 4 : 3));
    shared_out(heads(), 1, task_bytes, [&](Range range) {
      for (int64_t head = range.begin; head < range.end; ++head) {
        recur(layer, i, head, layer.decay.data(), true);
        norm_head(layer.norm_heads, head);
        if (has_gate) gate_head(head);
      }
    });
    add_output(layer.output);
  }

  const std::vector<Rwkv5Layer>& layers_;
};

void Rwkv5::run(const Call& call, Workspace& memory) const { Rwkv5Pass(*this, call).run(memory); }

}  // namespace rookery
