// Whole models: rookery._native.Model.
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/module.hpp"
#include "bindings/tensor.hpp"
#include "core/threads.hpp"
#include "kernels/reading.hpp"
#include "runtime/adapter.hpp"
#include "runtime/rwkv4.hpp"
#include "runtime/rwkv5.hpp"
#include "runtime/rwkv6.hpp"
#include "runtime/rwkv7.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Plane = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A config's fields by name.
struct Config {
  const nb::dict& fields;
  std::int64_t size(const char* name) const { return nb::cast<std::int64_t>(fields[name]); }
  float number(const char* name) const { return nb::cast<float>(fields[name]); }
  bool truth(const char* name) const { return nb::cast<bool>(fields[name]); }
  std::string word(const char* name) const { return nb::cast<std::string>(fields[name]); }
};

Sizes sizes_of(const Config& c, std::int64_t wkv) {
  return {c.size("vocab_size"),
          c.size("hidden_size"),
          c.size("num_hidden_layers"),
          c.size("intermediate_size"),
          wkv,
          c.number("layer_norm_eps"),
          c.fields.contains("rescale_every") ? c.size("rescale_every") : 0};
}

std::unique_ptr<Model> make(
    const std::string& family, const Config& c, Weights& weights, Isa isa, int threads) {
  const std::int64_t width = c.size("hidden_size");
  if (family == "rwkv4") return std::make_unique<Rwkv4>(sizes_of(c, 3 * width), weights, isa, threads);
  const std::int64_t head = c.size("head_dim");
  const Sizes sizes = sizes_of(c, width * head);
  const float eps = c.number("group_norm_eps");
  if (family == "rwkv5") {
    const Rwkv5Sizes own{head, eps, c.truth("has_gate"), c.word("decay") == "head", c.word("bonus") == "time_first"};
    return std::make_unique<Rwkv5>(sizes, own, weights, isa, threads);
  }
  if (family == "rwkv6") {
    const std::string variant = c.word("variant");  // x060, x060a, …
    const Rwkv6Sizes own{head, c.size("mix_rank"), c.size("decay_rank"), c.size("gate_rank"), eps,
                         variant.size() == 5 ? variant[4] : '\0', c.truth("damp_keys")};
    return std::make_unique<Rwkv6>(sizes, own, weights, isa, threads);
  }
  if (family == "rwkv7") {
    const Rwkv7Sizes own{head, c.size("decay_rank"), c.size("rate_rank"), c.size("value_rank"), c.size("gate_rank"),
                         eps};
    return std::make_unique<Rwkv7>(sizes, own, weights, isa, threads);
  }
  throw std::invalid_argument("there is no runtime for the family " + family);
}

// The bytes of a packed matrix, with its format, order, outputs and inputs.
Tensor packed_tensor(const Array& bytes, const nb::tuple& how) {
  const auto out = nb::cast<std::int64_t>(how[2]), in = nb::cast<std::int64_t>(how[3]);
  const Matrix matrix{bytes.data(), find_format(nb::cast<std::string>(how[0])),
                      find_order(nb::cast<std::string>(how[1])), out, in};
  if (!is_packed(matrix.format) || matrix.bytes() != bytes.nbytes())
    throw std::invalid_argument("a packed matrix has another size than its description says");
  if (matrix.format == Format::q6_k && matrix.order != Order::rows)
    throw std::invalid_argument("a matrix of the format q6_k is laid out by rows only");
  return {matrix.data, matrix.format, {out, in}, matrix.order};
}

std::vector<float> floats_of(const nb::dict& from, const char* name) {
  if (!from.contains(name)) return {};
  const auto array = nb::cast<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(from[name]);
  return {array.data(), array.data() + array.size()};
}

std::vector<std::int32_t> numbers_of(const nb::dict& from, const char* name) {
  const auto array = nb::cast<Numbers>(from[name]);
  return {array.data(), array.data() + array.size()};
}

Sparsity sparsity_of(const nb::dict& layer, std::int64_t width, std::int64_t hidden) {
  Sparsity guess;
  const Config c{layer};
  guess.rank = c.size("rank");
  guess.least = c.number("least");
  guess.kept = c.size("kept");
  if (layer.contains("bits")) {
    const auto bits = nb::cast<nb::ndarray<const std::uint8_t, nb::c_contig, nb::device::cpu>>(layer["bits"]);
    guess.shadow = {bits.data(), c.size("planes"), hidden, width};
    const auto size = static_cast<std::size_t>(guess.shadow.planes * hidden * guess.shadow.line());
    if (guess.shadow.planes < 1 || bits.size() != size)
      throw std::invalid_argument("the shadow of a channel mix has another size than its matrix");
  }
  guess.base = floats_of(layer, "base");
  guess.step = floats_of(layer, "step");
  const bool levels_fit = guess.base.empty() || guess.base.size() == static_cast<std::size_t>(hidden);
  if (guess.kept < 0 || guess.kept > hidden || guess.base.size() != guess.step.size() || !levels_fit)
    throw std::invalid_argument("what is said of a channel mix's sparsity does not fit its size");
  return guess;
}

Clusters clusters_of(const nb::dict& from, std::int64_t vocab) {
  Clusters clusters;
  const Config c{from};
  clusters.starts = numbers_of(from, "starts");
  clusters.order = numbers_of(from, "order");
  clusters.mass = c.number("mass");
  clusters.fewest = c.size("fewest");
  clusters.most = c.size("most");
  const auto& starts = clusters.starts;
  bool fits = starts.size() > 1 && starts.front() == 0 && starts.back() == vocab &&
              clusters.order.size() == static_cast<std::size_t>(vocab) && clusters.most > 0;
  for (std::size_t i = 1; fits && i < starts.size(); ++i) fits = starts[i] > starts[i - 1];
  for (const std::int32_t token : clusters.order) fits = fits && token >= 0 && token < vocab;
  if (!fits) throw std::invalid_argument("the clusters of the head do not fit the vocabulary");
  return clusters;
}

Lite lite_of(const nb::dict& from, const Config& c) {
  Lite lite;
  if (from.size() == 0) return lite;
  lite.embedding_rows = Config{from}.size("embedding_rows");
  if (from.contains("file")) {
    const auto mapped = nb::cast<nb::ndarray<nb::ro, const std::uint8_t, nb::c_contig, nb::device::cpu>>(from["mapped"]);
    lite.file = std::make_shared<ModelFile>(nb::cast<std::string>(from["file"]), mapped.data(), mapped.size());
  }
  for (const auto& layer : nb::list(from["layers"]))
    lite.layers.push_back(sparsity_of(nb::cast<nb::dict>(layer), c.size("hidden_size"), c.size("intermediate_size")));
  if (!lite.layers.empty() && static_cast<std::int64_t>(lite.layers.size()) != c.size("num_hidden_layers"))
    throw std::invalid_argument("the sparsity of another number of layers is described than the model has");
  if (from.contains("clusters")) lite.clusters = clusters_of(nb::cast<nb::dict>(from["clusters"]), c.size("vocab_size"));
  return lite;
}

// A model and the Python arrays that it reads from.
struct Loaded {
  std::unique_ptr<Model> runtime;
  std::map<std::string, Array> kept;
  nb::dict described;  // holds the arrays of a compressed model that are used where they lie

  Loaded(
      const std::string& family, const nb::dict& config, const std::map<std::string, Array>& arrays,
      const std::string& isa, int threads, const nb::dict& packed, const nb::dict& lite)
      : described(lite) {
    std::map<std::string, Tensor> tensors;
    for (const auto& [name, array] : arrays)
      tensors[name] = packed.contains(name.c_str()) ? packed_tensor(array, nb::tuple(packed[name.c_str()])) : tensor(array);
    Weights weights(std::move(tensors));
    weights.lite = lite_of(lite, {config});
    runtime = make(family, {config}, weights, find_isa(isa), threads);
    for (const std::string& name : weights.borrowed()) kept.emplace(name, arrays.at(name));
  }

  void check_state(const Floats& state) const {
    if (static_cast<std::int64_t>(state.size()) != runtime->sizes.state())
      throw std::invalid_argument("a state has another size than this model's");
  }

  void begin(const Floats& state) const {
    check_state(state);
    runtime->begin(state.data());
  }

  void forward(
      const Numbers& tokens, const std::vector<Floats>& states, const std::vector<std::int64_t>& lengths,
      const Numbers& wanted, const Floats& logits, int threads, bool chained,
      const std::vector<const Adapter*>& adapters) const {
    const auto count = static_cast<std::int64_t>(tokens.size());
    if (!adapters.empty() && adapters.size() != states.size())
      throw std::invalid_argument("states and adapters do not fit together");
    std::vector<Segment> segments;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < states.size(); ++i) {
      check_state(states[i]);
      const Adapter* adapter = adapters.empty() ? nullptr : adapters[i];
      if (adapter && !adapter->is_for(*runtime)) throw std::invalid_argument("an adapter was made for another model");
      const float* from = i > 0 && chained ? states[i - 1].data() : nullptr;
      segments.push_back({states[i].data(), lengths.at(i), from, adapter});
      total += lengths[i];
    }
    if (total != count || logits.size() != wanted.size() * static_cast<std::size_t>(runtime->sizes.vocab))
      throw std::invalid_argument("tokens, lengths and logits do not fit together");
    for (std::int64_t i = 0; i < count; ++i)
      if (tokens.data()[i] < 0 || tokens.data()[i] >= runtime->sizes.vocab)
        throw std::invalid_argument(
            "token id " + std::to_string(tokens.data()[i]) + " is not in the model's vocabulary of " +
            std::to_string(runtime->sizes.vocab) + "; check that the tokenizer is the model's own");
    std::int32_t last = -1;
    for (std::size_t i = 0; i < wanted.size(); last = wanted.data()[i++])
      if (wanted.data()[i] <= last || wanted.data()[i] >= count)
        throw std::invalid_argument("the positions whose logits are wanted must rise and be positions of tokens");
    nb::gil_scoped_release unlocked;
    runtime->forward(
        {tokens.data(), tokens.size()}, segments, {wanted.data(), wanted.size()}, logits.data(), threads);
  }
};

// A name's A [rank, in] and B turned, [rank, out].
using Pair = std::tuple<Plane, Plane>;

Adapter adapter_of(const Loaded& model, const std::map<std::string, Pair>& pairs) {
  std::map<std::string, Adapter::Factors> factors;
  for (const auto& [name, pair] : pairs) {
    const auto& [a, b] = pair;
    if (a.shape(0) != b.shape(0)) throw std::invalid_argument("the two factors of '" + name + "' differ in their rank");
    const auto size = [](const Plane& of, std::size_t axis) { return static_cast<std::int64_t>(of.shape(axis)); };
    factors[name] = {a.data(), b.data(), size(a, 0), size(b, 1), size(a, 1)};
  }
  return {*model.runtime, factors};
}

// Reads an array once, each thread a part of it.
std::uint32_t read_memory(const Array& array, int threads, const std::string& isa) {
  const auto& kernels = reading_kernels(find_isa(isa));
  const auto* memory = static_cast<const std::byte*>(array.data());
  const auto blocks = static_cast<std::int64_t>(array.nbytes()) / 1024;
  std::atomic<std::uint32_t> result{0};
  nb::gil_scoped_release unlocked;
  constexpr int parts = 256;
  parallel_for(parts, threads, [&](int part) {
    const std::int64_t begin = blocks * part / parts, end = blocks * (part + 1) / parts;
    result ^= kernels.read(memory + begin * 1024, (end - begin) * 1024);
  });
  return result;
}

}  // namespace

void bind_runtime(nb::module_& m) {
  m.def("read_memory", &read_memory, "array"_a, "threads"_a, "isa"_a = "",
        "Reads an array (but for its last bytes) from memory, as fast as it can be: the exclusive or of its words.");
  nb::class_<Loaded>(m, "Model", "A model that runs on the CPU.")
      .def(nb::init<const std::string&, const nb::dict&, const std::map<std::string, Array>&, const std::string&, int,
                    const nb::dict&, const nb::dict&>(),
           "family"_a, "config"_a, "tensors"_a, "isa"_a, "threads"_a, "packed"_a = nb::dict(),
           "lite"_a = nb::dict(),
           "`tensors` under their official names, bfloat16 as uint16. `packed`: name -> (format, order, outputs, "
           "inputs) of those that are the bytes of packed matrices. `lite`: how the model was compressed, if it was; see "
           "rookery.engine.runners.lite.")
      .def_prop_ro("state_size", [](const Loaded& model) { return model.runtime->sizes.state(); },
                   "Numbers of one sequence's state.")
      .def_prop_ro("in_place",
                   [](const Loaded& model) {
                     std::vector<std::string> names;
                     for (const auto& [name, array] : model.kept) names.push_back(name);
                     return names;
                   },
                   "Names of the tensors that are used where they lie, and kept alive.")
      .def_prop_ro("matrices",
                   [](const Loaded& model) {
                     nb::dict shapes;
                     for (const auto& [name, matrix] : model.runtime->matrices())
                       shapes[name.c_str()] = nb::make_tuple(matrix.out, matrix.in);
                     return shapes;
                   },
                   "Tensor name -> (outputs, inputs), of the matrices that adapters may change.")
      .def_prop_ro("ffn_reads",
                   [](const Loaded& model) {
                     return nb::make_tuple(model.runtime->ffn_reads.load(), model.runtime->ffn_columns.load());
                   },
                   "Columns of the channel mixes' second matrices read so far, and how many there were.")
      .def_prop_ro("lite_counts",
                   [](const Loaded& model) {
                     const LiteCounts& counts = model.runtime->lite_counts;
                     nb::dict read;
                     read["units"] = counts.units.load();
                     read["of_units"] = counts.of_units.load();
                     read["head_rows"] = counts.rows.load();
                     read["head_clusters"] = counts.clusters.load();
                     read["heads"] = counts.heads.load();
                     read["hits"] = counts.hits.load();
                     read["misses"] = counts.misses.load();
                     return read;
                   },
                   "What was read so far of a compressed model: hidden units of steps of few tokens, and how many there "
                   "were; rows and clusters of the head, and how often it was computed; hits and misses of the "
                   "embedding cache.")
      .def("watch", [](const Loaded& model, bool on) { model.runtime->times.on = on; }, "on"_a,
           "Begins or ends to add up where the time of calls goes.")
      .def_prop_ro("times",
                   [](const Loaded& model) {
                     constexpr std::array<const char*, step_parts> names{
                         "embedding", "norms and shifts", "projections", "recurrence", "output", "channel mix", "head"};
                     nb::dict seconds;
                     for (std::size_t i = 0; i < step_parts; ++i)
                       seconds[names[i]] = 1e-9 * static_cast<double>(model.runtime->times.nanoseconds[i].load());
                     return seconds;
                   },
                   "Part of a step -> seconds, over all calls that were watched.")
      .def_prop_ro("isa", [](const Loaded& model) { return std::string(name(model.runtime->isa)); })
      .def("begin", &Loaded::begin, "state"_a, "Makes a state that before the first token.")
      .def("forward", &Loaded::forward, "tokens"_a, "states"_a, "lengths"_a, "wanted"_a, "logits"_a, "threads"_a, "chained"_a = false,
           "adapters"_a = std::vector<const Adapter*>(),
           "Reads lengths[i] tokens into states[i], one sequence after the other, and writes the logits that follow "
           "the tokens at the positions `wanted`. With `chained` all are one sequence: each state but the first is "
           "written, and begins where the one before it ends. `adapters`: of each sequence, or None; left out, none has "
           "one.");
  nb::class_<Adapter>(m, "Adapter", "Low-rank changes of one model's matrices, which stay beside them.")
      .def("__init__",
           [](Adapter* self, const Loaded& model, const std::map<std::string, Pair>& pairs) {
             new (self) Adapter(adapter_of(model, pairs));
           },
           "model"_a, "pairs"_a, nb::keep_alive<1, 2>(),
           "`pairs`: tensor name -> (A [rank, inputs], B turned [rank, outputs]), float32, which are copied.")
      .def_prop_ro("largest_rank", &Adapter::largest_rank);
}

}  // namespace rookery
