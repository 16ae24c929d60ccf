// Whole models: rookery._native.Rwkv7.
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/module.hpp"
#include "core/threads.hpp"
#include "kernels/reading.hpp"
#include "runtime/rwkv7.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Tensor tensor(const Array& array) {
  Tensor tensor{array.data(), Format::float32, {}};
  for (std::size_t i = 0; i < array.ndim(); ++i) tensor.shape.push_back(static_cast<std::int64_t>(array.shape(i)));
  const auto type = array.dtype();
  if (type == nb::dtype<float>())
    tensor.format = Format::float32;
  else if (type == nb::dtype<std::uint16_t>())  // numpy itself knows no bfloat16
    tensor.format = Format::bfloat16;
  else if (type.code == static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 16)
    tensor.format = Format::float16;
  else
    throw std::invalid_argument("a tensor is neither float32, float16 nor uint16 (the bits of bfloat16)");
  return tensor;
}

std::int64_t size(const nb::dict& sizes, const char* name) { return nb::cast<std::int64_t>(sizes[name]); }

// A model and the Python arrays that it reads from.
struct Model {
  std::unique_ptr<Rwkv7> runtime;
  std::map<std::string, Array> kept;

  Model(const nb::dict& sizes, const std::map<std::string, Array>& arrays, const std::string& isa, int threads) {
    std::map<std::string, Tensor> tensors;
    for (const auto& [name, array] : arrays) tensors[name] = tensor(array);
    Weights weights(std::move(tensors));
    runtime = std::make_unique<Rwkv7>(
        Rwkv7Sizes{size(sizes, "vocab_size"), size(sizes, "hidden_size"), size(sizes, "num_hidden_layers"),
                   size(sizes, "head_dim"), size(sizes, "intermediate_size"), size(sizes, "decay_rank"),
                   size(sizes, "rate_rank"), size(sizes, "value_rank"), size(sizes, "gate_rank"),
                   nb::cast<float>(sizes["layer_norm_eps"]), nb::cast<float>(sizes["group_norm_eps"])},
        weights, find_isa(isa), threads);
    for (const std::string& name : weights.borrowed()) kept.emplace(name, arrays.at(name));
  }

  void forward(
      const Numbers& tokens, const std::vector<Floats>& states, const std::vector<std::int64_t>& lengths,
      const Numbers& wanted, const Floats& logits, int threads) const {
    const auto count = static_cast<std::int64_t>(tokens.size());
    std::vector<Segment> segments;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < states.size(); ++i) {
      if (static_cast<std::int64_t>(states[i].size()) != runtime->sizes.state())
        throw std::invalid_argument("a state has another size than this model's");
      segments.push_back({states[i].data(), lengths.at(i)});
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
  nb::class_<Model>(m, "Rwkv7", "An RWKV-7 model that runs on the CPU.")
      .def(nb::init<const nb::dict&, const std::map<std::string, Array>&, const std::string&, int>(), "sizes"_a,
           "tensors"_a, "isa"_a, "threads"_a,
           "`tensors` under their official names, bfloat16 as uint16.")
      .def_prop_ro("state_size", [](const Model& model) { return model.runtime->sizes.state(); },
                   "Numbers of one sequence's state.")
      .def_prop_ro("in_place",
                   [](const Model& model) {
                     std::vector<std::string> names;
                     for (const auto& [name, array] : model.kept) names.push_back(name);
                     return names;
                   },
                   "Names of the tensors that are used where they lie, and kept alive.")
      .def_prop_ro("ffn_reads",
                   [](const Model& model) {
                     return nb::make_tuple(model.runtime->ffn_reads.load(), model.runtime->ffn_columns.load());
                   },
                   "Columns of the channel mixes' second matrices read so far, and how many there were.")
      .def_prop_ro("isa", [](const Model& model) { return std::string(name(model.runtime->isa)); })
      .def("forward", &Model::forward, "tokens"_a, "states"_a, "lengths"_a, "wanted"_a, "logits"_a, "threads"_a,
           "Reads lengths[i] tokens into states[i], one sequence after the other, and writes the logits that follow "
           "the tokens at the positions `wanted`.");
}

}  // namespace rookery
