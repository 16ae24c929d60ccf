// Greedy longest match over a vocabulary of byte strings, and the vocabulary itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rookery {

struct Piece {
  std::uint32_t id;
  std::string_view bytes;
};

// Pieces of a World-format text file ("id literal length" a line, see vocabulary.py), in the file's order.
struct PieceList {
  std::string storage;  // what the pieces point into
  std::vector<Piece> pieces;
};

// Reads plain files fast; nullopt where a line is damaged or written in a way that `repr` never writes. vocabulary.py
// reads those too, or says what is wrong with them.
std::optional<PieceList> parse_vocabulary(std::string_view text);

class Trie {
 public:
  static constexpr std::uint32_t max_id = (1u << 23) - 1;
  static constexpr std::size_t max_piece = 65535;

  // Ids are 1 … max_id and increase; pieces have 1 … max_piece bytes, each differs from the others. Otherwise, or where the
  // trie would need more than 2^24 cells, throws std::invalid_argument.
  explicit Trie(const std::vector<Piece>& pieces);

  struct Encoded {
    std::size_t tokens;  // written to `out`
    std::size_t bytes;   // read from the text: less than its length where no piece matches
  };
  // Splits `text`, which has at most as many tokens as bytes; `out` has room for that many.
  Encoded encode(std::string_view text, std::uint32_t* out) const;

  // The bytes of a token; empty where no piece has that id (id 0, end of text, among them).
  std::string_view piece(std::uint32_t id) const {
    return id >= vocab_size() ? std::string_view()
                              : std::string_view(bytes_).substr(starts_[id], starts_[id + 1] - starts_[id]);
  }
  // The largest id plus one.
  std::uint32_t vocab_size() const { return static_cast<std::uint32_t>(starts_.size() - 1); }

 private:
  // A node and where its children lie: cells_[base + (byte − first)] for byte − first < count. In that range, bytes that
  // lead nowhere have a cell without id and children. 8 bytes, so that a block of siblings shares few cache lines.
  struct Cell {
    std::uint64_t base : 24, first : 8, count : 9, id : 23;
  };

  static constexpr std::size_t max_cells = std::size_t{1} << 24;

  void build(const std::vector<Piece>& sorted);

  std::vector<Cell> cells_;  // the first 256 are the root's children
  std::string bytes_;        // all pieces by id
  std::vector<std::uint32_t> starts_;
};

}  // namespace rookery
