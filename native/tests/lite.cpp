// Compressed models: their kernels against plain loops, whole models cut, shared out among threads and read from files.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>

#include "kernels/packing.hpp"
#include "kernels/shadow.hpp"
#include "runtime/rwkv7.hpp"
#include "tests/check.hpp"

namespace rookery::tests {
namespace {

using std::int64_t;

constexpr int64_t vocab = 41, width = 48, head_dim = 48, layers = 2, hidden = 201, rank = 6, clusters = 5, small = 7;

TEST(sums_of_a_shadow_are_those_of_its_codes) {
  Random random(1);
  for (const int64_t in : {8, 13, 40})
    for (const int64_t planes : {1, 2, 4}) {
      constexpr int64_t rows = 9;
      const int64_t line = (in + 7) / 8;
      std::vector<std::uint8_t> bits(static_cast<std::size_t>(planes * rows * line));
      for (auto& byte : bits) byte = static_cast<std::uint8_t>(random.below(256));
      const Floats x = random.normals(in);
      Floats padded(static_cast<std::size_t>((in + 15) / 16 * 16)), first;
      std::copy(x.begin(), x.end(), padded.begin());
      for (const Isa isa : available_isas()) {
        Floats sums(rows);
        shadow_kernels(isa).sums({bits.data(), planes, rows, in}, padded.data(), sums.data(), 0, rows);
        if (first.empty()) first = sums;
        expect(same(sums, first), name(isa), "has other bits");
        for (int64_t r = 0; r < rows; ++r) {
          double wanted = 0;
          for (int64_t p = 0; p < planes; ++p)
            for (int64_t i = 0; i < in; ++i)
              if (bits[static_cast<std::size_t>((p * rows + r) * line + i / 8)] >> (i % 8) & 1)
                wanted += std::ldexp(x[static_cast<std::size_t>(i)], static_cast<int>(p));
          expect(std::abs(sums[static_cast<std::size_t>(r)] - wanted) < 1e-4, name(isa), in, planes, r);
        }
      }
    }
}

std::vector<std::byte> packed(const Floats& values, Order order, int64_t out, int64_t in) {
  const Matrix from{values.data(), Format::float32, Order::rows, out, in};
  const Packing how = packing(Format::int8);
  std::vector<std::byte> bytes(static_cast<std::size_t>(how.bytes(order, out, in)));
  const int64_t units = order == Order::rows ? how.panels(out) : how.groups(in);
  packing_kernels(Isa::portable)
      .pack(from, Format::int8, order, 0, units, reinterpret_cast<std::uint8_t*>(bytes.data()));
  return bytes;
}

TEST(a_column_of_a_packed_matrix_is_its_weights) {
  Random random(2);
  constexpr int64_t out = 90, in = 70;
  const Floats values = random.normals(out * in);
  const auto bytes = packed(values, Order::columns, out, in);
  const Matrix w{bytes.data(), Format::int8, Order::columns, out, in};
  for (const Isa isa : available_isas())
    for (const int64_t input : {0, 5, 63, 64, 69}) {
      Floats column(out);
      shadow_kernels(isa).column(w, input, 0, out, column.data());
      for (int64_t o = 0; o < out; ++o)
        expect(std::abs(column[static_cast<std::size_t>(o)] - values[static_cast<std::size_t>(o * in + input)]) < 0.03,
               name(isa), input, o);
    }
}

// A compressed model's tensors, in one piece of memory that is also a file.
struct Compressed {
  Random random{3};
  std::vector<std::byte> memory;
  std::map<std::string, std::pair<std::size_t, Tensor>> places;
  std::vector<std::vector<std::uint8_t>> shadows;
  std::vector<std::int32_t> starts{0, 3, 4, 20, 33, 41}, order;
  std::filesystem::path path;

  explicit Compressed(bool int8) {
    add("emb.weight", {vocab, width}, 1);
    for (const char* norm : {"ln_out.", "blocks.0.ln0."}) both(norm, width);
    for (int64_t i = 0; i < layers; ++i) add_layer("blocks." + std::to_string(i) + ".", int8);
    add("head.weight", {vocab, width}, 0.3f, int8 ? Order::rows : Order::columns);
    add("head_l1.weight", {clusters, width}, 0.3f);
    order.resize(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::reverse(order.begin(), order.end());
    path = std::filesystem::temp_directory_path() / (int8 ? "rookery-lite-int8.bin" : "rookery-lite.bin");
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(memory.data()), static_cast<long>(memory.size()));
  }
  ~Compressed() { std::filesystem::remove(path); }

  void place(const std::string& name, const void* data, std::size_t size, Tensor tensor) {
    memory.resize((memory.size() + 63) / 64 * 64);
    places[name] = {memory.size(), std::move(tensor)};
    const auto* bytes = static_cast<const std::byte*>(data);
    memory.insert(memory.end(), bytes, bytes + size);
  }
  // `packs` rows: as int8 by rows; columns: as floats
  void add(const std::string& name, std::vector<int64_t> shape, float scale, Order packs = Order::columns) {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    const Floats values = random.normals(count, scale);
    if (packs == Order::columns) return place(name, values.data(), values.size() * 4, {nullptr, Format::float32, shape});
    const auto bytes = packed(values, Order::rows, shape[0], shape[1]);
    place(name, bytes.data(), bytes.size(), {nullptr, Format::int8, shape, Order::rows});
  }
  void both(const std::string& at, int64_t count) {
    for (const char* name : {"weight", "bias"}) add(at + name, {count}, 0.5f);
  }
  void add_layer(const std::string& at, bool int8) {
    for (const char* norm : {"ln1.", "ln2.", "att.ln_x."}) both(at + norm, width);
    for (const char* name : {"x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "v0", "k_k", "k_a", "r_k"})
      add(at + "att." + name, {width}, 0.5f);
    for (const char* name : {"w", "a", "v", "g"}) {
      add(at + "att." + name + "1", {width, small}, 0.2f);
      add(at + "att." + name + "2", {small, width}, 0.2f);
    }
    for (const char* name : {"receptance", "key", "value"}) {
      add(at + "att." + name + "1.weight", {rank, width}, 0.2f);
      add(at + "att." + name + "2.weight", {width, rank}, 0.3f);
    }
    add(at + "att.output.weight", {width, width}, 0.15f);
    add(at + "ffn.x_k", {width}, 0.5f);
    add(at + "mlp.fc1.weight", {rank, width}, 0.2f);
    add(at + "mlp.fc2.weight", {hidden, rank}, 0.3f);
    auto& bits = shadows.emplace_back(hidden * width / 8);
    for (auto& byte : bits) byte = static_cast<std::uint8_t>(random.below(256));
    if (!int8) return add(at + "ffn.neurons", {hidden, 2 * width}, 0.15f);
    constexpr int64_t unit = 64;  // the width filled up to whole lines
    const auto bytes = packed(random.normals((unit + width) * hidden, 0.15f), Order::columns, unit + width, hidden);
    place(at + "ffn.neurons", bytes.data(), bytes.size(), {nullptr, Format::int8, {unit + width, hidden}, Order::columns});
  }

  std::unique_ptr<Model> model(Isa isa, bool lean, int64_t cached) const {
    std::map<std::string, Tensor> tensors;
    for (const auto& [name, at] : places) {
      tensors[name] = at.second;
      tensors[name].data = memory.data() + at.first;
    }
    Weights weights(std::move(tensors));
    weights.lite.embedding_rows = cached;
    if (lean) weights.lite.file = std::make_shared<ModelFile>(path.string(), memory.data(), memory.size());
    for (const auto& bits : shadows) {
      Sparsity guess;
      guess.rank = rank;
      guess.least = 0.2f;
      guess.shadow = {bits.data(), 1, hidden, width};
      guess.kept = 40;
      weights.lite.layers.push_back(guess);
    }
    weights.lite.clusters.starts = starts;
    weights.lite.clusters.order = order;
    weights.lite.clusters.mass = 0.7;
    weights.lite.clusters.fewest = 1;
    weights.lite.clusters.most = 3;
    const Rwkv7Sizes own{head_dim, small, small, small, small, 64e-5f};
    return std::make_unique<Rwkv7>(Sizes{vocab, width, layers, hidden, width * head_dim, 1e-5f}, own, weights, isa, 2);
  }
};

Floats read(const Model& model, std::size_t cut, int threads) {
  constexpr std::size_t length = 23;
  std::vector<std::int32_t> ids(length);
  for (std::size_t i = 0; i < length; ++i) ids[i] = static_cast<std::int32_t>(i * 7 % vocab);
  Floats logits(length * vocab), state(static_cast<std::size_t>(model.sizes.state()));
  model.begin(state.data());
  for (std::size_t first = 0; first < length; first += cut) {
    const std::size_t count = std::min(cut, length - first);
    std::vector<std::int32_t> wanted(count);
    std::iota(wanted.begin(), wanted.end(), 0);
    const Segment segment{state.data(), static_cast<int64_t>(count)};
    model.forward({ids.data() + first, count}, {&segment, 1}, wanted, logits.data() + first * vocab, threads);
  }
  return logits;
}

TEST(compressed_models_give_the_same_bits_however_they_are_read) {
  for (const bool int8 : {false, true}) {
    const Compressed made(int8);
    for (const Isa isa : available_isas()) {
      const Floats whole = read(*made.model(isa, false, 0), 23, 1);
      for (const float x : whole) expect(std::isfinite(x), "a logit is", x);
      for (const bool lean : {false, true})
        for (const int64_t cached : {0, 1, 9}) {
          const auto model = made.model(isa, lean, cached);
          for (const std::size_t cut : {1, 3, 23})
            expect(same(read(*model, cut, cut == 3 ? 3 : 1), whole), name(isa), int8, lean, cached, cut);
        }
    }
  }
}

TEST(a_token_reads_a_part_of_the_units_and_rows) {
  const Compressed made(false);
  const auto model = made.model(available_isas().back(), true, 4);
  read(*model, 1, 1);
  const LiteCounts& counts = model->lite_counts;
  expect(counts.units > 0 && counts.units < counts.of_units, counts.units.load(), "of", counts.of_units.load());
  expect(counts.rows < counts.heads * vocab && counts.clusters <= 3 * counts.heads, counts.rows.load());
  expect(counts.hits + counts.misses == 23, counts.hits.load(), counts.misses.load());
}

}  // namespace
}  // namespace rookery::tests
