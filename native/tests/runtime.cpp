// Whole models with random weights: every cut, batch and number of threads gives the same bits.
#include <array>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "runtime/rwkv4.hpp"
#include "runtime/rwkv5.hpp"
#include "runtime/rwkv6.hpp"
#include "runtime/rwkv7.hpp"
#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;

constexpr int64_t vocab = 37, layers = 2, hidden = 201, length = 21;

// Tensors by their official names, each in memory of its own.
struct Tensors {
  Random random{21};
  Format format = Format::float32;
  std::map<std::string, Stored> kept;
  std::map<std::string, Tensor> all;

  void add(const std::string& name, std::vector<int64_t> shape, float scale) {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    const Stored& values = kept[name] = stored(random, count, format, scale);
    all[name] = {values.data(), format, std::move(shape)};
  }
  void matrix(const std::string& name, int64_t out, int64_t in) {
    add(name, {out, in}, 1 / std::sqrt(static_cast<float>(in)));
  }
  void vectors(const std::string& at, std::initializer_list<const char*> names, int64_t count) {
    for (const char* name : names) add(at + name, {count}, 0.5f);
  }
};

void add_skeleton(Tensors& t, int64_t width) {
  t.add("emb.weight", {vocab, width}, 1);
  t.matrix("head.weight", vocab, width);
  t.vectors("ln_out.", {"weight", "bias"}, width);
  t.vectors("blocks.0.ln0.", {"weight", "bias"}, width);
  for (int64_t i = 0; i < layers; ++i) {
    const std::string at = "blocks." + std::to_string(i) + ".";
    t.vectors(at, {"ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"}, width);
    t.matrix(at + "ffn.key.weight", hidden, width);
    t.matrix(at + "ffn.value.weight", width, hidden);
    for (const char* name : {"receptance", "key", "value", "output"})
      t.matrix(at + "att." + name + ".weight", width, width);
  }
}

// Tensors that older families have in every block besides those of the skeleton.
void add_older(Tensors& t, int64_t width, const std::string& at, const char* mix) {
  t.matrix(at + "ffn.receptance.weight", width, width);
  t.vectors(at + "ffn." + mix, {"k", "r"}, width);
}

std::unique_ptr<Model> rwkv4(Isa isa, int threads, Tensors& t) {
  constexpr int64_t width = 40;
  add_skeleton(t, width);
  for (const std::string at : {"blocks.0.", "blocks.1."}) {
    add_older(t, width, at, "time_mix_");
    t.vectors(at + "att.", {"time_decay", "time_first", "time_mix_k", "time_mix_v", "time_mix_r"}, width);
  }
  Weights weights(t.all);
  return std::make_unique<Rwkv4>(Sizes{vocab, width, layers, hidden, 3 * width, 1e-5f, 1}, weights, isa, threads);
}

std::unique_ptr<Model> rwkv5(Isa isa, int threads, Tensors& t) {
  constexpr int64_t width = 48, head = 24;
  add_skeleton(t, width);
  for (const std::string at : {"blocks.0.", "blocks.1."}) {
    add_older(t, width, at, "time_mix_");
    t.matrix(at + "att.gate.weight", width, width);
    t.vectors(at + "att.", {"time_mix_k", "time_mix_v", "time_mix_r", "time_mix_g", "ln_x.weight", "ln_x.bias"}, width);
    t.vectors(at + "att.", {"time_decay", "time_faaaa"}, width / head);
  }
  Weights weights(t.all);
  const Rwkv5Sizes own{head, 64e-5f, true, true, false};
  return std::make_unique<Rwkv5>(Sizes{vocab, width, layers, hidden, width * head, 1e-5f}, own, weights, isa, threads);
}

std::unique_ptr<Model> rwkv6(Isa isa, int threads, Tensors& t) {
  constexpr int64_t width = 48, head = 24, rank = 3, decay = 5;
  add_skeleton(t, width);
  for (const std::string at : {"blocks.0.", "blocks.1."}) {
    add_older(t, width, at, "time_maa_");
    t.matrix(at + "att.gate.weight", width, width);
    t.vectors(at + "att.", {"time_maa_x", "time_maa_w", "time_maa_k", "time_maa_v", "time_maa_r", "time_maa_g",
                            "time_decay", "time_faaaa", "ln_x.weight", "ln_x.bias"}, width);
    t.add(at + "att.time_maa_w1", {width, 5 * rank}, 0.2f);
    t.add(at + "att.time_maa_w2", {5, rank, width}, 0.2f);
    t.add(at + "att.time_decay_w1", {width, decay}, 0.2f);
    t.add(at + "att.time_decay_w2", {decay, width}, 0.2f);
  }
  Weights weights(t.all);
  const Rwkv6Sizes own{head, rank, decay, 0, 64e-5f, 0, false};
  return std::make_unique<Rwkv6>(Sizes{vocab, width, layers, hidden, width * head, 1e-5f}, own, weights, isa, threads);
}

std::unique_ptr<Model> rwkv7(Isa isa, int threads, Tensors& t) {
  constexpr int64_t width = 96, head = 48;
  const Rwkv7Sizes own{head, 5, 7, 3, 9, 64e-5f};
  add_skeleton(t, width);
  for (const std::string at : {"blocks.0.", "blocks.1."}) {
    t.vectors(at, {"ffn.x_k"}, width);
    t.vectors(at + "att.", {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k",
                            "ln_x.weight", "ln_x.bias"}, width);
    const std::map<std::string, int64_t> ranks{{"w", own.decay_rank}, {"a", own.rate_rank}, {"v", own.value_rank},
                                               {"g", own.gate_rank}};
    for (const auto& [letter, rank] : ranks) {
      t.add(at + "att." + letter + "1", {width, rank}, 0.2f);
      t.add(at + "att." + letter + "2", {rank, width}, 0.2f);
    }
  }
  Weights weights(t.all);
  return std::make_unique<Rwkv7>(Sizes{vocab, width, layers, hidden, width * head, 1e-5f}, own, weights, isa, threads);
}

using Build = std::unique_ptr<Model> (*)(Isa, int, Tensors&);
constexpr std::array<std::pair<const char*, Build>, 4> families{
    {{"rwkv4", rwkv4}, {"rwkv5", rwkv5}, {"rwkv6", rwkv6}, {"rwkv7", rwkv7}}};

std::vector<std::int32_t> some_tokens(int64_t count, unsigned seed) {
  Random random(seed);
  std::vector<std::int32_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back(random.below(vocab));
  return ids;
}

Floats fresh(const Model& model) {
  Floats state(static_cast<std::size_t>(model.sizes.state()));
  model.begin(state.data());
  return state;
}

// Logits of all tokens, read `cut` at a time.
Floats read(const Model& model, const std::vector<std::int32_t>& ids, Floats& state, std::size_t cut, int threads) {
  Floats logits(ids.size() * vocab);
  for (std::size_t first = 0; first < ids.size(); first += cut) {
    const std::size_t count = std::min(cut, ids.size() - first);
    std::vector<std::int32_t> wanted(count);
    std::iota(wanted.begin(), wanted.end(), 0);
    const Segment segment{state.data(), static_cast<int64_t>(count)};
    model.forward({ids.data() + first, count}, {&segment, 1}, wanted, logits.data() + first * vocab, threads);
  }
  return logits;
}

void check_batch(const Model& model, const char* family, int threads) {
  constexpr std::size_t rows = 5;
  std::vector<Floats> states, alone;
  std::vector<Segment> segments;
  std::vector<std::int32_t> ids, wanted;
  Floats expected;
  for (std::size_t row = 0; row < rows; ++row) {
    states.push_back(fresh(model));
    read(model, some_tokens(3, 40), states[row], 3, 1);
    alone.push_back(states[row]);
    // prompts of unequal length beside single tokens
    const auto own = some_tokens(row % 2 ? 1 : 4, static_cast<unsigned>(50 + row));
    ids.insert(ids.end(), own.begin(), own.end());
    wanted.push_back(static_cast<std::int32_t>(ids.size()) - 1);
    const Floats logits = read(model, own, alone[row], own.size(), 1);
    expected.insert(expected.end(), logits.end() - vocab, logits.end());
  }
  for (std::size_t row = 0; row < rows; ++row) segments.push_back({states[row].data(), row % 2 ? 1 : 4});
  Floats logits(rows * vocab);
  model.forward(ids, segments, wanted, logits.data(), threads);
  expect(same(logits, expected), family, name(model.isa), threads, "threads: a row in a batch is not the row alone");
  for (std::size_t row = 0; row < rows; ++row)
    expect(same(states[row], alone[row]), family, name(model.isa), "state of row", row);
}

TEST(cuts_batches_and_threads_change_no_bit_and_instruction_sets_agree) {
  const auto ids = some_tokens(length, 31);
  for (const auto& [family, build] : families)
    for (const Format format : {Format::float32, Format::bfloat16}) {
      Floats portable;
      for (const Isa isa : available_isas()) {
        Tensors tensors;
        tensors.format = format;
        const auto model = build(isa, 2, tensors);
        Floats whole_state = fresh(*model);
        const Floats whole = read(*model, ids, whole_state, length, 1);
        for (const float x : whole) expect(std::isfinite(x), family, "a logit is", x);
        for (const int threads : {1, 3})
          for (const std::size_t cut : {1, 2, 16}) {
            Floats state = fresh(*model);
            expect(same(read(*model, ids, state, cut, threads), whole), family, name(isa), threads, cut);
            expect(same(state, whole_state), family, name(isa), threads, cut, "state");
          }
        for (const int threads : {1, 3}) check_batch(*model, family, threads);
        if (isa == Isa::portable) portable = whole;
        // where bfloat16 numbers are multiplied in pairs the inputs are rounded, too
        const bool rounds = format == Format::bfloat16 && product_kernels(isa).round;
        expect(apart(whole, portable) < (rounds ? 2e-2 : 1e-3), family, name(isa), "differs by", apart(whole, portable));
      }
    }
}

TEST(a_prompt_longer_than_the_working_memory_is_read_in_pieces) {
  const auto ids = some_tokens(300, 32);
  for (const auto& [family, build] : families) {
    Tensors tensors;
    const auto model = build(available_isas().back(), 1, tensors);
    Floats whole_state = fresh(*model), state = fresh(*model);
    const Floats whole = read(*model, ids, whole_state, ids.size(), 2);
    expect(same(read(*model, ids, state, 77, 1), whole) && same(state, whole_state), family);
  }
}

TEST(models_are_used_by_several_threads_at_once) {
  for (const auto& [family, build] : families) {
    Tensors tensors;
    const auto model = build(available_isas().back(), 2, tensors);
    std::array<Floats, 3> answers;
    const auto work = [&](std::size_t i) {
      for (int round = 0; round < 5; ++round) {
        Floats state = fresh(*model);
        answers[i] = read(*model, some_tokens(length, 33), state, 1 + static_cast<std::size_t>(round), 2);
      }
    };
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < answers.size(); ++i) threads.emplace_back(work, i);
    for (std::thread& thread : threads) thread.join();
    expect(same(answers[0], answers[1]) && same(answers[1], answers[2]), family);
  }
}

TEST(weights_that_are_missing_or_of_another_size_are_refused_by_name) {
  for (const bool missing : {true, false}) {
    Tensors tensors;
    const auto build = [&] { return rwkv6(Isa::portable, 1, tensors); };
    build();
    const std::string name = "blocks.1.att.time_decay_w2";
    if (missing)
      tensors.all.erase(name);
    else
      tensors.all[name].shape = {4, 48};
    std::string message;
    try {
      Weights weights(tensors.all);
      const Rwkv6 model(Sizes{vocab, 48, layers, hidden, 48 * 24, 1e-5f}, {24, 3, 5, 0, 64e-5f, 0, false}, weights,
                        Isa::portable, 1);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    expect(message.find(name) != std::string::npos, "the refusal says:", message);
  }
}

}  // namespace
}  // namespace rookery::tests
