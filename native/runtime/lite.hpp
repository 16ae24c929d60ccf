// RWKV-Lite (arXiv 2412.10856): what a compressed model has beside or in place of its large matrices.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/matrix.hpp"
#include "kernels/shadow.hpp"

namespace rookery {

// Which hidden units of a channel mix are used is guessed from its input, before its matrices are read: those that a
// small network finds likely, and those whose products with a shadow of the key matrix are the largest.
struct Sparsity {
  std::int64_t rank = 0;  // of the network first [rank, width], second [hidden, rank]; 0: there is none
  float least = 0;        // its outputs above this are likely
  Matrix first, second;
  Shadow shadow;                   // no planes: there is none
  std::vector<float> base, step;   // [hidden] or empty: score = base · sum of the input + step · product
  std::int64_t kept = 0;           // units that the shadow chooses for each token

  bool is_on() const { return rank > 0 || shadow.planes > 0; }
};

// The head's rows sorted by cluster, and a small head that guesses the clusters.
struct Clusters {
  std::vector<std::int32_t> starts, order;  // [clusters + 1], [vocab]: rows of a cluster; token of a row
  double mass = 1;                          // of the guess: the likeliest clusters that have it together are computed
  std::int64_t fewest = 1, most = 0;
  Matrix first;  // [clusters, width]

  std::int64_t count() const { return static_cast<std::int64_t>(starts.size()) - 1; }
  bool is_on() const { return !starts.empty(); }
};

// The file that tensors are mapped from, for models that read what a token needs instead of touching its pages: the
// system maps whole pages, and those around them, of which a token needs a part.
class ModelFile {
 public:
  ModelFile() = default;
  // `mapped`: `size` bytes of the file `path` from its start. Throws std::invalid_argument if it cannot be opened.
  ModelFile(const std::string& path, const void* mapped, std::size_t size);
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  // Copies mapped bytes, by reading the file; bytes that are elsewhere are copied from there.
  void fetch(const std::byte* from, std::size_t count, std::byte* to) const;

 private:
  int descriptor_ = -1;
  const std::byte* begin_ = nullptr;
  std::size_t size_ = 0;
};

struct Lite {
  std::shared_ptr<ModelFile> file;  // null: what is mapped is used where it lies
  std::int64_t embedding_rows = 0;  // that are kept in memory; 0: all are read where they lie
  std::vector<Sparsity> layers;     // empty, or one for every layer
  Clusters clusters;
};

// What was read so far, over all calls.
struct LiteCounts {
  std::atomic<std::int64_t> units{0}, of_units{0};        // of compressed channel mixes, by step
  std::atomic<std::int64_t> rows{0}, clusters{0}, heads{0};  // of the head, and how often it was computed
  std::atomic<std::int64_t> hits{0}, misses{0};           // of the embedding cache
};

// Rows of the embedding that were used last, at most `capacity`.
class EmbeddingCache {
 public:
  EmbeddingCache(const Matrix& from, std::int64_t capacity, std::shared_ptr<ModelFile> file)
      : from_(from), file_(std::move(file)), row_(static_cast<std::size_t>(from.in) * bytes_of(from.format)),
        capacity_(capacity) {
    memory_.resize(static_cast<std::size_t>(std::min(capacity, from.out)) * row_);
  }

  // Copies the row of `token` to `to`.
  void read(std::int64_t token, std::byte* to, LiteCounts& counts) {
    const std::lock_guard lock(mutex_);
    const auto found = where_.find(token);
    if (found != where_.end()) {
      counts.hits.fetch_add(1, std::memory_order_relaxed);
      recent_.splice(recent_.begin(), recent_, found->second);
    } else {
      counts.misses.fetch_add(1, std::memory_order_relaxed);
      std::size_t slot = recent_.size();
      if (slot == static_cast<std::size_t>(capacity_)) {
        slot = recent_.back().slot;
        where_.erase(recent_.back().token);
        recent_.pop_back();
      }
      recent_.push_front({token, slot});
      where_[token] = recent_.begin();
      const auto* row = static_cast<const std::byte*>(from_.data) + static_cast<std::size_t>(token) * row_;
      std::byte* place = memory_.data() + slot * row_;
      if (file_)
        file_->fetch(row, row_, place);
      else
        std::memcpy(place, row, row_);
    }
    std::memcpy(to, memory_.data() + recent_.front().slot * row_, row_);
  }

 private:
  struct Entry {
    std::int64_t token;
    std::size_t slot;
  };
  Matrix from_;
  std::shared_ptr<ModelFile> file_;
  std::size_t row_;
  std::int64_t capacity_;
  std::vector<std::byte> memory_;
  std::list<Entry> recent_;  // the last used first
  std::unordered_map<std::int64_t, std::list<Entry>::iterator> where_;
  std::mutex mutex_;
};

}  // namespace rookery
