#include "tokenizer/trie.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

namespace rookery {
namespace {

// The first eight bytes as a number that sorts as they do.
std::uint64_t prefix(std::string_view bytes) {
  std::uint64_t key = 0;
  for (std::size_t i = 0; i < 8; ++i) key = key << 8 | (i < bytes.size() ? static_cast<unsigned char>(bytes[i]) : 0);
  return key;
}

// In the order of their bytes; pieces of the same bytes end up side by side.
std::vector<Piece> sorted_by_bytes(const std::vector<Piece>& pieces) {
  struct Key {
    std::uint64_t start;
    Piece piece;
  };
  std::vector<Key> keys;
  keys.reserve(pieces.size());
  for (const Piece& piece : pieces) keys.push_back({prefix(piece.bytes), piece});
  std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) {
    return a.start != b.start ? a.start < b.start : a.piece.bytes < b.piece.bytes;
  });
  std::vector<Piece> sorted;
  sorted.reserve(keys.size());
  for (const Key& key : keys) sorted.push_back(key.piece);
  return sorted;
}

}  // namespace

Trie::Trie(const std::vector<Piece>& pieces) {
  std::size_t total = 0;
  for (const Piece& piece : pieces) total += piece.bytes.size();
  bytes_.reserve(total);
  starts_.reserve(pieces.size() + 2);
  starts_.push_back(0);
  for (const Piece& piece : pieces) {
    if (piece.id < starts_.size() || piece.id > max_id || piece.bytes.empty() || piece.bytes.size() > max_piece)
      throw std::invalid_argument("ids must increase from 1 to at most 8388607 and pieces have 1 to 65535 bytes");
    starts_.resize(piece.id + 1, static_cast<std::uint32_t>(bytes_.size()));
    bytes_ += piece.bytes;
  }
  starts_.push_back(static_cast<std::uint32_t>(bytes_.size()));
  build(sorted_by_bytes(pieces));
}

void Trie::build(const std::vector<Piece>& sorted) {
  // pieces [low, high), more than one or longer than `depth`, share their first `depth` bytes: the way to cell `place`
  struct Node {
    std::uint32_t place, low, high, depth;
  };
  constexpr std::uint32_t root = UINT32_MAX;
  std::vector<Node> queue;
  queue.reserve(sorted.size() + 1);
  if (!sorted.empty()) queue.push_back({root, 0, static_cast<std::uint32_t>(sorted.size()), 0});
  cells_.reserve(256 + 5 * sorted.size());  // about what a World vocabulary needs
  cells_.assign(256, Cell{});
  // breadth first: the blocks near the root, which every token passes, lie together
  for (std::size_t next = 0; next < queue.size(); ++next) {
    auto [place, low, high, depth] = queue[next];
    if (sorted[low].bytes.size() == depth) {
      cells_[place].id = sorted[low].id;
      if (++low < high && sorted[low].bytes.size() == depth) throw std::invalid_argument("two pieces are the same");
    }
    const auto byte_of = [&](std::size_t i) { return static_cast<unsigned char>(sorted[i].bytes[depth]); };
    const unsigned first = place == root ? 0 : byte_of(low);
    const std::size_t base = place == root ? 0 : cells_.size();
    if (place != root) {
      const unsigned count = byte_of(high - 1) - first + 1;
      if (base + count > max_cells) throw std::invalid_argument("the vocabulary is too large for the trie");
      cells_.resize(base + count);
      cells_[place].base = base;
      cells_[place].first = first;
      cells_[place].count = count;
    }
    for (std::uint32_t i = low, end; i < high; i = end) {
      const unsigned byte = byte_of(i);
      for (end = i + 1; end < high && byte_of(end) == byte;) ++end;
      const auto child = static_cast<std::uint32_t>(base + byte - first);
      if (end == i + 1 && sorted[i].bytes.size() == depth + 1) {
        cells_[child].id = sorted[i].id;  // a leaf, as most nodes are
      } else {
        queue.push_back({child, i, end, depth + 1});
      }
    }
  }
}

Trie::Encoded Trie::encode(std::string_view text, std::uint32_t* out) const {
  const auto* data = reinterpret_cast<const unsigned char*>(text.data());
  const auto* const stop = data + text.size();
  const Cell* const cells = cells_.data();
  std::uint32_t* const begin = out;
  while (data != stop) {
    const unsigned char* next = data;
    const unsigned char* end = data;
    Cell cell = cells[*next++];
    std::uint32_t id = 0;
    for (;;) {
      // written for conditional moves: whether a prefix is itself a piece is hard to predict
      end = cell.id ? next : end;
      id = cell.id ? static_cast<std::uint32_t>(cell.id) : id;
      if (next == stop) break;
      const unsigned child = static_cast<unsigned>(*next) - static_cast<unsigned>(cell.first);
      if (child >= cell.count) break;
      cell = cells[cell.base + child];
      ++next;
    }
    if (end == data) break;  // not even this byte alone
    *out++ = id;
    data = end;
  }
  return {static_cast<std::size_t>(out - begin), text.size() - static_cast<std::size_t>(stop - data)};
}

}  // namespace rookery
