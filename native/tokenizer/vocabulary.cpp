// The text form of a vocabulary. A World vocabulary has 65,529 lines; evaluating them in Python takes a second.
#include <charconv>

#include "tokenizer/trie.hpp"

namespace rookery {
namespace {

void append_utf8(std::string& out, std::uint32_t point) {
  if (point < 0x80) {
    out += static_cast<char>(point);
  } else if (point < 0x800) {
    out += static_cast<char>(0xC0 | point >> 6);
    out += static_cast<char>(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    out += static_cast<char>(0xE0 | point >> 12);
    out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (point & 0x3F));
  } else {
    out += static_cast<char>(0xF0 | point >> 18);
    out += static_cast<char>(0x80 | (point >> 12 & 0x3F));
    out += static_cast<char>(0x80 | (point >> 6 & 0x3F));
    out += static_cast<char>(0x80 | (point & 0x3F));
  }
}

// Length of the UTF-8 sequence at the start of `text`, 0 where it is not valid (Unicode 15, table 3-7).
std::size_t utf8_length(std::string_view text) {
  const auto at = [&](std::size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const auto follows = [&](std::size_t i) { return (at(i) & 0xC0) == 0x80; };
  const unsigned lead = at(0);
  if (lead < 0x80) return 1;
  if (lead < 0xC2) return 0;
  if (lead < 0xE0) return follows(1) ? 2 : 0;
  if (lead < 0xF0) {
    const bool fits = lead == 0xE0 ? at(1) >= 0xA0 : lead == 0xED ? at(1) < 0xA0 : true;
    return fits && follows(1) && follows(2) ? 3 : 0;
  }
  if (lead > 0xF4) return 0;
  const bool fits = lead == 0xF0 ? at(1) >= 0x90 : lead == 0xF4 ? at(1) < 0x90 : true;
  return fits && follows(1) && follows(2) && follows(3) ? 4 : 0;
}

template <class Number>
bool read_number(std::string_view digits, Number& number, int base = 10) {
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number, base);
  return error == std::errc() && end == digits.data() + digits.size();
}

// Appends what the escape at the start of `rest` (after the backslash) stands for; returns its length, 0 if unknown.
std::size_t unescape(std::string_view rest, bool is_bytes, std::string& out) {
  constexpr std::string_view letters = "\\'\"nrtabfv", values = "\\'\"\n\r\t\a\b\f\v";
  if (rest.empty()) return 0;
  if (const auto i = letters.find(rest[0]); i != letters.npos) {
    out += values[i];
    return 1;
  }
  const std::size_t digits = rest[0] == 'x' ? 2 : is_bytes ? 0 : rest[0] == 'u' ? 4 : rest[0] == 'U' ? 8 : 0;
  std::uint32_t point = 0;
  if (digits == 0 || rest.size() <= digits || !read_number(rest.substr(1, digits), point, 16)) return 0;
  if (point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return 0;
  if (is_bytes) {
    out += static_cast<char>(point);
  } else {
    append_utf8(out, point);
  }
  return 1 + digits;
}

// Appends the value of a string or bytes literal in single or double quotes.
bool read_literal(std::string_view literal, std::string& out) {
  const bool is_bytes = literal.starts_with('b');
  if (is_bytes) literal.remove_prefix(1);
  if (literal.size() < 2 || (literal[0] != '\'' && literal[0] != '"') || literal.back() != literal[0]) return false;
  const char quote = literal[0];
  for (std::size_t i = 1, length; i < literal.size() - 1; i += length) {
    const char c = literal[i];
    if (c == quote || c == '\0' || c == '\r') return false;
    if (c == '\\') {
      // the closing quote is no part of an escape, so it is cut off
      length = unescape(literal.substr(i + 1, literal.size() - i - 2), is_bytes, out);
      if (length++ == 0) return false;
    } else {
      length = is_bytes ? static_cast<unsigned char>(c) < 0x80 : utf8_length(literal.substr(i));
      if (length == 0) return false;
      out += literal.substr(i, length);
    }
  }
  return true;
}

}  // namespace

std::optional<PieceList> parse_vocabulary(std::string_view text) {
  text = text.substr(0, text.find_last_not_of("\r\n") + 1);
  PieceList list;
  list.storage.reserve(text.size());  // a literal is longer than its value, so the pieces never move
  while (!text.empty()) {
    const std::size_t newline = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, newline);
    text.remove_prefix(std::min(newline + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    // literals contain spaces: the id ends at the first space, the length starts after the last one
    const std::size_t head = line.find(' '), tail = line.rfind(' ');
    if (head == line.npos || tail == head) return std::nullopt;
    Piece piece;
    std::size_t length = 0;
    const std::size_t start = list.storage.size();
    if (!read_number(line.substr(0, head), piece.id) || !read_number(line.substr(tail + 1), length) ||
        !read_literal(line.substr(head + 1, tail - head - 1), list.storage) || list.storage.size() - start != length)
      return std::nullopt;
    piece.bytes = std::string_view(list.storage).substr(start);
    list.pieces.push_back(piece);
  }
  if (list.pieces.empty()) return std::nullopt;
  return list;
}

}  // namespace rookery
