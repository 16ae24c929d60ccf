// The trie of the tokenizers in Python: str or bytes in, lists or arrays of ids out.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/unique_ptr.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/module.hpp"
#include "core/threads.hpp"
#include "tokenizer/trie.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace rookery {
namespace {

using Ids = nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<1>>;

// The UTF-8 form of a str (which the str keeps), or the contents of a bytes object; valid as long as the object.
std::string_view view_of(nb::handle text) {
  if (PyBytes_Check(text.ptr()))
    return {PyBytes_AS_STRING(text.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(text.ptr()))};
  if (!PyUnicode_Check(text.ptr())) throw nb::type_error("a text is str or bytes");
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!data) throw nb::python_error();
  return {data, static_cast<std::size_t>(size)};
}

[[noreturn]] void raise_lookup_error(long long number) {
  PyErr_SetObject(PyExc_LookupError, nb::int_(number).ptr());
  throw nb::python_error();
}

class Tokenizer {
 public:
  explicit Tokenizer(const std::vector<Piece>& pieces) : trie_(pieces), numbers_(trie_.vocab_size()) {}

  nb::list encode(nb::handle text) {
    std::unique_ptr<std::uint32_t[]> ids;
    const std::size_t count = encode_into(ids, view_of(text));
    nb::list list = nb::steal<nb::list>(PyList_New(static_cast<Py_ssize_t>(count)));
    if (!list.is_valid()) throw nb::python_error();
    for (std::size_t i = 0; i < count; ++i) PyList_SET_ITEM(list.ptr(), i, number(ids[i]).inc_ref().ptr());
    return list;
  }

  Ids encode_array(nb::handle text) {
    std::unique_ptr<std::uint32_t[]> ids;
    const std::size_t count = encode_into(ids, view_of(text));
    return to_array(std::vector<std::uint32_t>(ids.get(), ids.get() + count));
  }

  nb::list encode_batch(nb::handle texts, int threads) {
    // a tuple of our own: another Python thread may change a list while the lock is released
    const nb::tuple kept = nb::steal<nb::tuple>(PySequence_Tuple(texts.ptr()));
    if (!kept.is_valid()) throw nb::python_error();
    std::vector<std::string_view> views;
    for (nb::handle text : kept) views.push_back(view_of(text));
    std::vector<std::vector<std::uint32_t>> results(views.size());
    std::vector<std::size_t> read(views.size());
    {
      nb::gil_scoped_release released;
      parallel_for(static_cast<int>(views.size()), threads, [&](int i) {
        const auto ids = std::make_unique_for_overwrite<std::uint32_t[]>(views[i].size());
        const auto [tokens, bytes] = trie_.encode(views[i], ids.get());
        results[i].assign(ids.get(), ids.get() + tokens);
        read[i] = bytes;
      });
    }
    nb::list list;
    for (std::size_t i = 0; i < views.size(); ++i) {
      if (read[i] < views[i].size()) {
        PyErr_SetObject(PyExc_LookupError, nb::make_tuple(read[i], i).ptr());
        throw nb::python_error();
      }
      list.append(to_array(std::move(results[i])));
    }
    return list;
  }

  nb::bytes decode(nb::handle ids) const {
    const nb::object items = nb::steal(PySequence_Fast(ids.ptr(), "token ids must be a sequence of integers"));
    if (!items.is_valid()) throw nb::python_error();
    std::string bytes;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      const long long id = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), i));
      if (id == -1 && PyErr_Occurred()) throw nb::python_error();
      if (id == 0) continue;  // end of text has no bytes
      if (id < 0 || id >= trie_.vocab_size()) raise_lookup_error(id);
      const std::string_view piece = trie_.piece(static_cast<std::uint32_t>(id));
      if (piece.empty()) raise_lookup_error(id);
      bytes += piece;
    }
    return nb::bytes(bytes.data(), bytes.size());
  }

  std::uint32_t vocab_size() const { return trie_.vocab_size(); }

 private:
  // Fills `ids` and returns how many there are.
  std::size_t encode_into(std::unique_ptr<std::uint32_t[]>& ids, std::string_view text) const {
    ids = std::make_unique_for_overwrite<std::uint32_t[]>(text.size());
    Trie::Encoded done;
    if (text.size() < 10'000) {  // releasing the lock costs more than so short a text
      done = trie_.encode(text, ids.get());
    } else {
      nb::gil_scoped_release released;
      done = trie_.encode(text, ids.get());
    }
    if (done.bytes < text.size()) raise_lookup_error(static_cast<long long>(done.bytes));
    return done.tokens;
  }

  // The Python integer of an id, made once: making them anew takes longer than the search for the tokens.
  nb::handle number(std::uint32_t id) {
    nb::object& kept = numbers_[id];
    if (!kept.is_valid()) kept = nb::int_(id);
    return kept;
  }

  static Ids to_array(std::vector<std::uint32_t> ids) {
    auto kept = std::make_unique<std::vector<std::uint32_t>>(std::move(ids));
    std::uint32_t* data = kept->data();
    const std::size_t count = kept->size();
    nb::capsule owner(kept.release(), [](void* p) noexcept { delete static_cast<std::vector<std::uint32_t>*>(p); });
    return Ids(data, {count}, owner);
  }

  Trie trie_;
  std::vector<nb::object> numbers_;
};

std::unique_ptr<Tokenizer> from_pieces(nb::dict pieces) {
  std::vector<Piece> list;
  for (auto [id, bytes] : pieces) list.push_back({nb::cast<std::uint32_t>(id), view_of(bytes)});
  return std::make_unique<Tokenizer>(list);
}

std::unique_ptr<Tokenizer> parse(nb::bytes text) {
  const auto list = parse_vocabulary({text.c_str(), text.size()});
  if (!list) return nullptr;
  try {
    return std::make_unique<Tokenizer>(list->pieces);
  } catch (const std::invalid_argument&) {
    return nullptr;
  }
}

}  // namespace

void bind_tokenizer(nb::module_& m) {
  nb::class_<Tokenizer>(m, "Trie", "Greedy longest match; a LookupError holds the offset or the id that has no piece.")
      .def_static("parse", &parse, "text"_a, nb::sig("def parse(text: bytes) -> Trie | None"),
                  "From the contents of a World-format file; None where vocabulary.py has to look at it.")
      .def_static("from_pieces", &from_pieces, "pieces"_a)
      .def("encode", &Tokenizer::encode, "text"_a)
      .def("encode_array", &Tokenizer::encode_array, "text"_a)
      .def("encode_batch", &Tokenizer::encode_batch, "texts"_a, "threads"_a)
      .def("decode", &Tokenizer::decode, "ids"_a)
      .def_prop_ro("vocab_size", &Tokenizer::vocab_size);
}

}  // namespace rookery
