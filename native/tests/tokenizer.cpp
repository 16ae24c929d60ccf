#include <algorithm>
#include <stdexcept>

#include "tests/check.hpp"
#include "tokenizer/trie.hpp"

namespace rookery::tests {
namespace {

// All bytes, and some pieces that share beginnings.
std::string some_vocabulary() {
  std::string text;
  constexpr char digits[] = "0123456789abcdef";
  int id = 0;
  for (int byte = 0; byte < 256; ++byte)
    text += std::to_string(++id) + " b'\\x" + digits[byte >> 4] + digits[byte & 15] + "' 1\n";
  for (const char* line : {"'th' 2", "'the' 3", "' the' 4", "\"it's\" 4", "'\\n\\n' 2", "'\\u4f60' 3", "'é' 2"})
    text += std::to_string(++id) + " " + line + "\n";
  return text;
}

std::vector<std::uint32_t> encoded(const Trie& trie, std::string_view text) {
  std::vector<std::uint32_t> ids(text.size());
  const auto [tokens, bytes] = trie.encode(text, ids.data());
  expect(bytes == text.size(), "not all of the text was read");
  ids.resize(tokens);
  return ids;
}

TEST(texts_are_cut_into_the_longest_pieces_and_put_together_again) {
  const std::string vocabulary = some_vocabulary();
  const auto list = parse_vocabulary(vocabulary);
  expect(list.has_value() && list->pieces.size() == 263, "the vocabulary is not read");
  const Trie trie(list->pieces);
  expect(encoded(trie, "the the") == std::vector<std::uint32_t>{258, 259}, "not the longest pieces");
  Random random(8);
  for (int length = 0; length < 60; ++length) {
    std::string text;
    for (int i = 0; i < length; ++i)
      text += random.below(3) ? std::string(1, static_cast<char>(random.below(256))) : std::string(" the\n\nit's");
    std::string again;
    for (const std::uint32_t id : encoded(trie, text)) again += trie.piece(id);
    expect(again == text, "a text of", length, "parts does not come back");
  }
  expect(trie.piece(0).empty() && trie.piece(1u << 30).empty(), "ids without a piece have one");
}

TEST(a_text_without_a_matching_piece_is_read_up_to_there) {
  const std::vector<Piece> pieces{{1, "a"}, {2, "ab"}, {5, "c"}};
  const Trie trie(pieces);
  std::vector<std::uint32_t> ids(4);
  const auto [tokens, bytes] = trie.encode("abcx", ids.data());
  expect(tokens == 2 && bytes == 3, tokens, bytes);
}

TEST(pieces_that_make_no_trie_are_refused) {
  const std::vector<std::vector<Piece>> wrong{
      {{0, "a"}}, {{2, "a"}, {1, "b"}}, {{1, "a"}, {2, "a"}}, {{1, ""}}, {{1u << 23, "a"}}};
  for (const auto& pieces : wrong) {
    bool refused = false;
    try {
      const Trie trie(pieces);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    expect(refused, "not refused:", pieces.size(), "pieces from", pieces[0].id);
  }
}

TEST(damaged_vocabularies_are_read_or_refused_but_never_beyond_their_end) {
  const std::string vocabulary = some_vocabulary().substr(3000);
  Random random(9);
  for (int round = 0; round < 3000; ++round) {
    const auto place = [&](const std::string& in) {
      return static_cast<std::size_t>(random.below(static_cast<int>(in.size())));
    };
    std::string text = vocabulary.substr(0, place(vocabulary));
    for (int i = random.below(4); i > 0 && !text.empty(); --i)
      text[place(text)] = static_cast<char>(random.below(256));
    text.shrink_to_fit();
    if (const auto list = parse_vocabulary(text))
      expect(std::ranges::all_of(list->pieces, [](const Piece& piece) { return piece.bytes.size() < 8; }), text);
  }
}

}  // namespace
}  // namespace rookery::tests
