#include "runtime/model.hpp"

#include "core/threads.hpp"

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
  return weights.borrow(at_ + name, Order::rows, out, in);
}

Matrix Reader::by_columns(const std::string& name, int64_t out, int64_t in) const {
  return weights.turned(at_ + name, Order::rows, out, in);
}

Matrix Reader::first_factor(const std::string& name, int64_t rank) const {
  return weights.turned(at_ + name, Order::columns, rank, width);
}

Matrix Reader::second_factor(const std::string& name, int64_t rank, int64_t block) const {
  return weights.in_blocks(at_ + name, width, rank, block);
}

void Model::read_ends(Reader& reader) {
  reader.leave();
  embedding_ = reader.matrix("emb.weight", sizes.vocab, sizes.width);
  norm_in_ = reader.norm("blocks.0.ln0");
  norm_out_ = reader.norm("ln_out");
  head_ = reader.matrix("head.weight", sizes.vocab, sizes.width);
}

void Model::read_channel_mix(
    Reader& reader, int64_t layer, std::initializer_list<const char*> mixes, bool complement) {
  ChannelMix& mix = channel_mixes_.emplace_back();
  reader.leave();
  mix.norm = reader.norm("blocks." + std::to_string(layer) + ".ln2");
  reader.enter(layer, "ffn");
  mix.mix = reader.mixes(mixes, complement);
  mix.key = reader.matrix("key.weight", sizes.hidden, sizes.width);
  mix.value = reader.by_columns("value.weight", sizes.width, sizes.hidden);
  if (mixes.size() > 1) mix.receptance = reader.matrix("receptance.weight", sizes.width, sizes.width);
}

void Model::finish(Weights& weights, int threads) {
  weights.fill(threads);
  copies_ = weights.copies();
}

void Model::forward(
    std::span<const std::int32_t> tokens, std::span<const Segment> segments, std::span<const std::int32_t> wanted,
    float* logits, int threads) const {
  if (threads <= 0) threads = available_cores();
  // so many tokens share one reading of the weights; more would only take more memory
  const int64_t most = std::clamp<int64_t>(196608 / sizes.width, 32, 256);
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
      piece.push_back({segment.state, some, segment.from});
      segment.from = nullptr;
      segment.tokens -= some;
      count += some;
      if (count == most) flush();
    }
  if (count > 0) flush();
  workspaces_.give(std::move(memory));
}

}  // namespace rookery
