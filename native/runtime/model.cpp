#include "runtime/model.hpp"

#include <stdexcept>

#include "core/threads.hpp"
#include "kernels/product.hpp"

namespace rookery {

using std::int64_t;

std::vector<float> Reader::vector(const std::string& name, int64_t count) const {
  return weights.vector(at_ + name, count);
}

Norm Reader::norm(const std::string& name) const { return {vector(name + ".weight"), vector(name + ".bias")}; }

std::vector<float> Reader::mixes(std::initializer_list<const char*> names, bool complement) const {
  std::vector<float> all;
  for (const char* name : names) {
    const auto mix = vector(name);
    all.insert(all.end(), mix.begin(), mix.end());
  }
  if (complement)
    for (float& x : all) x = 1.0f - x;
  return all;
}

Matrix Reader::matrix(const std::string& name, int64_t out, int64_t in) const {
  return weights.changeable(at_ + name, weights.borrow(at_ + name, Order::rows, out, in));
}

Projection Reader::projection(const std::string& name, int64_t out, int64_t in) {
  const std::string stem = name.substr(0, name.rfind('.'));
  const std::string first = at_ + stem + "1.weight", second = at_ + stem + "2.weight";
  if (!weights.has(first)) return {matrix(name, out, in), {}};
  const int64_t rank = weights.outputs(first, in);
  weights.largest_rank = std::max(weights.largest_rank, rank);
  return {weights.borrow(second, Order::rows, out, rank), weights.borrow(first, Order::rows, rank, in)};
}

Matrix Reader::by_columns(const std::string& name, int64_t out, int64_t in) const {
  return weights.changeable(at_ + name, weights.turned(at_ + name, Order::rows, out, in));
}

Matrix Reader::first_factor(const std::string& name, int64_t rank) const {
  return weights.turned(at_ + name, Order::columns, rank, width);
}

Matrix Reader::second_factor(const std::string& name, int64_t rank, int64_t block) const {
  return weights.in_blocks(at_ + name, width, rank, block);
}

void Model::read_ends(Reader& reader) {
  reader.leave();
  embedding_ = reader.weights.borrow("emb.weight", Order::rows, sizes.vocab, sizes.width);
  norm_in_ = reader.norm("blocks.0.ln0");
  norm_out_ = reader.norm("ln_out");
  head_ = reader.matrix("head.weight", sizes.vocab, sizes.width);
  const Lite& lite = reader.weights.lite;
  clusters_ = lite.clusters;
  if (clusters_.is_on()) clusters_.first = reader.matrix("head_l1.weight", clusters_.count(), sizes.width);
  if (lite.embedding_rows > 0) cache_ = std::make_unique<EmbeddingCache>(embedding_, lite.embedding_rows, lite.file);
  file_ = lite.file;
}

void Model::read_channel_mix(
    Reader& reader, int64_t layer, std::initializer_list<const char*> mixes, bool complement) {
  ChannelMix& mix = channel_mixes_.emplace_back();
  reader.leave();
  mix.norm = reader.norm("blocks." + std::to_string(layer) + ".ln2");
  reader.enter(layer, "ffn");
  mix.mix = reader.mixes(mixes, complement);
  if (mixes.size() > 1) mix.receptance = reader.projection("receptance.weight", sizes.width, sizes.width);
  const auto& lite = reader.weights.lite.layers;
  if (!lite.empty()) mix.sparsity = lite.at(static_cast<std::size_t>(layer));
  if (mix.sparsity.is_on()) {
    read_neurons(reader, layer, mix);
    return;
  }
  mix.key = reader.matrix("key.weight", sizes.hidden, sizes.width);
  mix.value = reader.by_columns("value.weight", sizes.width, sizes.hidden);
}

void Model::read_neurons(Reader& reader, int64_t layer, ChannelMix& mix) {
  const Matrix both = reader.weights.neurons(reader.at() + "neurons", sizes.hidden, sizes.width);
  if (is_packed(both.format)) {
    mix.key = mix.value = both;
    mix.value_from = both.out - sizes.width;
  } else {
    const auto row = static_cast<std::size_t>(sizes.width) * bytes_of(both.format);
    const auto* half = static_cast<const std::byte*>(both.data) + row;
    mix.key = {both.data, both.format, Order::rows, sizes.hidden, sizes.width, 2 * sizes.width};
    mix.value = {half, both.format, Order::columns, sizes.width, sizes.hidden, 2 * sizes.width};
  }
  Sparsity& guess = mix.sparsity;
  if (guess.rank == 0) return;
  reader.enter(layer, "mlp");
  guess.first = reader.matrix("fc1.weight", guess.rank, sizes.width);
  guess.second = reader.matrix("fc2.weight", sizes.hidden, guess.rank);
  if (is_packed(guess.first.format) || is_packed(guess.second.format))
    throw std::invalid_argument("the predictor of layer " + std::to_string(layer) + " is packed; it must be of floats");
}

void Model::finish(Weights& weights, int threads) {
  weights.fill(threads);
  copies_ = weights.copies();
  largest_rank_ = weights.largest_rank;
  matrices_ = weights.changeable();
}

void Model::forward(
    std::span<const std::int32_t> tokens, std::span<const Segment> segments, std::span<const std::int32_t> wanted,
    float* logits, int threads) const {
  if (threads <= 0) threads = available_cores();
  // so many tokens share one reading of the weights; more would only take more memory
  int64_t most = std::clamp<int64_t>(196608 / sizes.width, 32, 256);
  // nor are so many read together that they need all hidden units
  if (file_) most = product_kernels(isa).few_tokens;
  auto memory = workspaces_.take();
  std::vector<Segment> piece;
  int64_t first = 0, count = 0;
  std::size_t answered = 0;
  const auto flush = [&] {
    std::size_t next = answered;
    while (next < wanted.size() && wanted[next] < first + count) ++next;
    const Call call{tokens.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)),
                    piece,
                    wanted.subspan(answered, next - answered),
                    first,
                    logits + static_cast<int64_t>(answered) * sizes.vocab,
                    threads};
    run(call, *memory);
    answered = next;
    first += count;
    count = 0;
    piece.clear();
  };
  for (Segment segment : segments)
    while (segment.tokens > 0) {
      const int64_t some = std::min(segment.tokens, most - count);
      piece.push_back({segment.state, some, segment.from, segment.adapter});
      segment.from = nullptr;
      segment.tokens -= some;
      count += some;
      if (count == most) flush();
    }
  if (count > 0) flush();
  workspaces_.give(std::move(memory));
}

}  // namespace rookery
