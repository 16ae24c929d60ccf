#include "runtime/rwkv4.hpp"

#include <array>
#include <cmath>

#include "kernels/wkv4.hpp"
#include "runtime/pass.hpp"

namespace rookery {

using std::int64_t;

namespace {

enum Mix { of_k, of_v, of_r };

}  // namespace

Rwkv4::Rwkv4(const Sizes& given, Weights& weights, Isa wanted, int threads) : Model(given, wanted) {
  Reader reader(weights, sizes.width);
  read_ends(reader);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    read_time_mix(reader, i);
    read_channel_mix(reader, i, {"time_mix_k", "time_mix_r"}, true);
  }
  finish(weights, threads);
}

void Rwkv4::read_time_mix(Reader& reader, int64_t i) {
  const int64_t width = sizes.width;
  Rwkv4Layer& layer = layers_.emplace_back();
  reader.leave();
  layer.norm = reader.norm("blocks." + std::to_string(i) + ".ln1");
  reader.enter(i, "att");
  layer.mix = reader.mixes({"time_mix_k", "time_mix_v", "time_mix_r"}, true);
  layer.log_w = reader.vector("time_decay");
  for (float& w : layer.log_w) w = -std::exp(w);
  layer.bonus = reader.vector("time_first");
  layer.receptance = reader.projection("receptance.weight", width, width);
  layer.key = reader.projection("key.weight", width, width);
  layer.value = reader.projection("value.weight", width, width);
  layer.output = reader.matrix("output.weight", width, width);
}

void Rwkv4::begin(float* state) const {
  Model::begin(state);
  for (int64_t i = 0; i < sizes.layers; ++i)
    std::fill_n(state + i * sizes.layer_state() + 3 * sizes.width, sizes.width, wkv4_nothing);
}

class Rwkv4Pass final : public Pass {
 public:
  Rwkv4Pass(const Rwkv4& model, const Call& call) : Pass(model, call, 3), layers_(model.layers_) {}

 private:
  void place(Workspace& memory) override {
    for (float** x : {&r_, &k_, &v_}) *x = memory.take(count_ * sizes_.width);
  }

  void time_mix(std::size_t i) override {
    const Rwkv4Layer& layer = layers_[i];
    const int64_t width = sizes_.width;
    shift(i, layer.norm, layer.mix, 0);
    const std::array jobs{job(layer.receptance, of_r, r_), job(layer.key, of_k, k_), job(layer.value, of_v, v_)};
    side_by_side(jobs);
    // as many channels at a time as a head of the later families has
    shared_out(width, 64, task_bytes / 64, [&](Range range) { recur(layer, i, range); });
    add_output(layer.output);
  }

  // Some channels of all sequences: from projections to the input of the output projection.
  void recur(const Rwkv4Layer& layer, std::size_t i, Range channels) const {
    const int64_t width = sizes_.width;
    for (std::size_t row = 0; row < segments_.size(); ++row) {
      const int64_t at = starts_[row] * width;
      const Wkv4Piece piece{segments_[row].tokens, width,   layer.log_w.data(), layer.bonus.data(),
                            k_ + at,               v_ + at, y_ + at};
      for (int64_t part = 1; part <= 3; ++part)
        inherit(row, i, part * width + channels.begin, channels.end - channels.begin);
      wkv4_.advance(piece, state(row, i) + width, channels.begin, channels.end);
    }
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * width + channels.begin;
      elementwise_.times_logistic(y_ + at, r_ + at, channels.end - channels.begin);
    }
  }

  const std::vector<Rwkv4Layer>& layers_;
  const Wkv4Kernels& wkv4_ = wkv4_kernels(model_.isa);
  float *r_, *k_, *v_;  // [tokens, width]
};

void Rwkv4::run(const Call& call, Workspace& memory) const { Rwkv4Pass(*this, call).run(memory); }

}  // namespace rookery
