#include "runtime/rwkv7.hpp"

#include <array>
#include <utility>

#include "kernels/wkv7.hpp"
#include "kernels/wkv7_inputs.hpp"
#include "kernels/wkv7_output.hpp"
#include "runtime/pass.hpp"

namespace rookery {

using std::int64_t;

namespace {

constexpr int mixes = 6;
enum Mix { of_r, of_w, of_k, of_v, of_a, of_g };

}  // namespace

Rwkv7::Rwkv7(const Sizes& given, const Rwkv7Sizes& own, Weights& weights, Isa wanted, int threads)
    : Model(given, wanted), own_(own) {
  Reader reader(weights, sizes.width);
  read_ends(reader);
  for (int64_t i = 0; i < sizes.layers; ++i) {
    read_time_mix(reader, i);
    read_channel_mix(reader, i, {"x_k"}, false);
  }
  finish(weights, threads);
}

void Rwkv7::read_time_mix(Reader& reader, int64_t i) {
  const int64_t width = sizes.width;
  Rwkv7Layer& layer = layers_.emplace_back();
  reader.leave();
  layer.norm = reader.norm("blocks." + std::to_string(i) + ".ln1");
  reader.enter(i, "att");
  const auto low_rank = [&](const std::string& name, int64_t rank, bool base) {
    return LowRank{base ? reader.vector(name + "0") : std::vector<float>(), reader.first_factor(name + "1", rank),
                   reader.second_factor(name + "2", rank, own_.head_dim)};
  };
  layer.mix = reader.mixes({"x_r", "x_w", "x_k", "x_v", "x_a", "x_g"});
  layer.receptance = reader.projection("receptance.weight", width, width);
  layer.key = reader.projection("key.weight", width, width);
  layer.value = reader.projection("value.weight", width, width);
  layer.output = reader.matrix("output.weight", width, width);
  layer.decay = low_rank("w", own_.decay_rank, true);
  layer.rate = low_rank("a", own_.rate_rank, true);
  if (i > 0) layer.residual = low_rank("v", own_.value_rank, true);
  layer.gate = low_rank("g", own_.gate_rank, false);
  layer.k_k = reader.vector("k_k");
  layer.k_a = reader.vector("k_a");
  layer.r_k = reader.vector("r_k");
  layer.norm_heads = reader.norm("ln_x");
}

class Rwkv7Pass final : public Pass {
 public:
  Rwkv7Pass(const Rwkv7& model, const Call& call) : Pass(model, call, mixes), model7_(model), own_(model.own_) {}

 private:
  int64_t heads() const { return sizes_.width / own_.head_dim; }
  // Floats for one head: 11 inputs and results of up to wkv7_chunk tokens, one of them with a row more.
  int64_t head_floats() const { return (11 * std::min(count_, wkv7_chunk) + 1) * own_.head_dim; }

  void place(Workspace& memory) override {
    const int64_t ranks = own_.decay_rank + own_.rate_rank + own_.value_rank + own_.gate_rank;
    for (float** x : {&r_, &k_, &v_, &v_first_, &decay_, &rate_, &residual_, &gate_})
      *x = memory.take(count_ * sizes_.width);
    low_ = memory.take(count_ * ranks);
    heads_ = memory.take(heads() * head_floats());
  }

  void time_mix(std::size_t i) override {
    const Rwkv7Layer& layer = model7_.layers_[i];
    shift(i, layer.norm, layer.mix, 0);

    float* low = low_;
    std::array<float*, 4> hidden{};
    std::array<Job, 7> jobs;
    std::size_t used = 0;
    const auto low_rank = [&](const LowRank& map, Mix mix, void (*then)(float*, int64_t)) {
      float* y = low;
      low += count_ * map.first.out;
      jobs[used++] = job(map.first, mix, y, then);
      return y;
    };
    jobs[used++] = job(layer.receptance, of_r, r_);
    jobs[used++] = job(layer.key, of_k, k_);
    jobs[used++] = job(layer.value, of_v, v_);
    hidden[0] = low_rank(layer.decay, of_w, elementwise_.hyperbolic_tangent);
    hidden[1] = low_rank(layer.rate, of_a, nullptr);
    hidden[2] = low_rank(layer.gate, of_g, elementwise_.logistic);
    if (i > 0) hidden[3] = low_rank(layer.residual, of_v, nullptr);
    side_by_side(std::span(jobs).first(used));

    shared_out(heads(), 1, task_bytes, [&](Range range) {
      for (int64_t head = range.begin; head < range.end; ++head) {
        head_inputs(layer, hidden, head);
        for (std::size_t row = 0; row < segments_.size(); ++row) recur(layer, i, head, row);
      }
    });
    add_output(layer.output);
  }

  // A head's second low-rank factors, and the mix of its values with the first layer's.
  void head_inputs(const Rwkv7Layer& layer, const std::array<float*, 4>& hidden, int64_t head) const {
    const int64_t width = sizes_.width, n = own_.head_dim, channel = head * n;
    second_factor(layer.decay, head, hidden[0], decay_);
    second_factor(layer.rate, head, hidden[1], rate_);
    second_factor(layer.gate, head, hidden[2], gate_);
    if (hidden[3]) second_factor(layer.residual, head, hidden[3], residual_);
    for (int64_t t = 0; t < count_; ++t) {
      const int64_t at = t * width + channel;
      if (hidden[3])
        elementwise_.approach(v_ + at, v_first_ + at, residual_ + at, n);
      else
        std::copy_n(v_ + at, n, v_first_ + at);
    }
  }

  // One head of one segment: from projections to the input of the output projection.
  void recur(const Rwkv7Layer& layer, std::size_t i, int64_t head, std::size_t row) const {
    const int64_t n = own_.head_dim, width = sizes_.width, channel = head * n;
    const int64_t end = starts_[row + 1], most = std::min(count_, wkv7_chunk);
    float* piece = heads_ + head * head_floats();
    const auto take = [&](int64_t tokens) { return std::exchange(piece, piece + tokens * n); };
    float *r = take(most), *k = take(most), *v = take(most), *decay = take(most), *rate = take(most);
    float *gate = take(most), *w = take(most), *key = take(most), *b = take(most), *y = take(most), *a = take(most + 1);
    float* matrix = state(row, i) + width + channel * n;
    inherit(row, i, width + channel * n, n * n);
    for (int64_t t = starts_[row]; t < end; t += most) {
      const int64_t count = std::min(most, end - t);
      const auto gather = [&](const float* from, float* to) {
        for (int64_t m = 0; m < count; ++m) std::copy_n(from + (t + m) * width + channel, n, to + m * n);
      };
      gather(r_, r);
      gather(k_, k);
      gather(v_, v);
      gather(decay_, decay);
      gather(rate_, rate);
      gather(gate_, gate);
      const Wkv7InputsArguments given{1, n, k, decay, rate, layer.k_k.data() + channel, layer.k_a.data() + channel};
      inputs_.forward[0](given, {w, key, a, b}, 0, count);
      elementwise_.exponential(w, count * n);
      std::fill_n(a + count * n, n, 0.0f);
      wkv7_.advance({count, n, n, r, w, key, a, b, v, y}, matrix);
      const Wkv7Output result{1, n, own_.group_norm_eps, y, r, key, v, gate, layer.r_k.data() + channel,
                              layer.norm_heads.weight.data() + channel, layer.norm_heads.bias.data() + channel};
      output_.forward[0](result, y, 0, count);
      for (int64_t m = 0; m < count; ++m) std::copy_n(y + m * n, n, y_ + (t + m) * width + channel);
    }
  }

  const Rwkv7& model7_;
  const Rwkv7Sizes& own_;
  const Wkv7InputsKernels& inputs_ = wkv7_inputs_kernels(model_.isa);
  const Wkv7Kernels& wkv7_ = wkv7_kernels(model_.isa);
  const Wkv7OutputKernels& output_ = wkv7_output_kernels(model_.isa);

  float *r_, *k_, *v_, *v_first_, *decay_, *rate_, *residual_, *gate_;  // [tokens, width]
  float *low_, *heads_;                                                 // [map, tokens, rank]; [heads, …]
};

void Rwkv7::run(const Call& call, Workspace& memory) const { Rwkv7Pass(*this, call).run(memory); }

}  // namespace rookery
