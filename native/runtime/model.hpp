// What all families share: a residual stream through blocks of a time mix, which each family defines, and a channel
// mix.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/isa.hpp"
#include "runtime/watch.hpp"
#include "runtime/weights.hpp"
#include "runtime/workspace.hpp"

namespace rookery {

struct Sizes {
  std::int64_t vocab, width, layers, hidden;
  std::int64_t wkv;  // floats of one block's recurrent state
  float layer_norm_eps;
  std::int64_t rescale_every = 0;  // blocks after which the residual stream is halved; 0: never

  // Floats of a layer's state: the time mix's last input [width], the recurrent state, the channel mix's last input
  // [width]. Matrices lie as [head, key, value], value fastest: the kernels' order.
  std::int64_t layer_state() const { return 2 * width + wkv; }
  std::int64_t state() const { return layers * layer_state(); }
};

struct Norm {
  std::vector<float> weight, bias;
};

// x ↦ base + second · f(first · x)
struct LowRank {
  std::vector<float> base;
  Matrix first, second;
};

// x ↦ value · relu(key · x)², where there is a `receptance` times the logistic function of that of x.
struct ChannelMix {
  Norm norm;
  std::vector<float> mix;  // [1 or 2, width], of key and receptance: the weight of the token before
  Matrix key, value;
  Projection receptance;
  Sparsity sparsity;
  std::int64_t value_from = 0;  // outputs of `value` before the first of its own

  bool has_gate() const { return receptance.out > 0; }
};

class Adapter;

// Some tokens of one sequence; `state` [Sizes::state()] is advanced, or written from `from`, the state of a segment
// before this one in the same call. What an `adapter` adds holds for these tokens alone.
struct Segment {
  float* state;
  std::int64_t tokens;
  const float* from = nullptr;
  const Adapter* adapter = nullptr;
};

// The part of a call that goes through the model at once.
struct Call {
  std::span<const std::int32_t> tokens;  // of all segments, one after the other
  std::span<const Segment> segments;
  std::span<const std::int32_t> wanted;  // numbers of the tokens whose logits are wanted …
  std::int64_t first;                    // … where tokens[0] has this number
  float* logits;
  int threads;
};

// Tensors under their official names, of one layer after the other.
class Reader {
 public:
  Reader(Weights& given, std::int64_t channels) : weights(given), width(channels) {}

  // Names from here on are those after "blocks.<layer>.<part>.".
  void enter(std::int64_t layer, const std::string& part) {
    at_ = "blocks." + std::to_string(layer) + "." + part + ".";
  }
  void leave() { at_.clear(); }

  std::vector<float> vector(const std::string& name) const { return vector(name, width); }
  std::vector<float> vector(const std::string& name, std::int64_t count) const;
  Norm norm(const std::string& name) const;
  // Vectors one after the other; `complement` takes 1 − x, for files that hold the weight of the token itself.
  std::vector<float> mixes(std::initializer_list<const char*> names, bool complement = false) const;
  Matrix matrix(const std::string& name, std::int64_t out, std::int64_t in) const;
  // A matrix of the time mix or a receptance, which may be factored.
  Projection projection(const std::string& name, std::int64_t out, std::int64_t in);
  // A matrix whose inputs are often zero: they can be skipped.
  Matrix by_columns(const std::string& name, std::int64_t out, std::int64_t in) const;
  // The factors of a low-rank map as files hold them, both [in, out]: bad for the first, whose rows are too short to
  // read fast, and for the second, whose outputs are needed in blocks (head by head).
  Matrix first_factor(const std::string& name, std::int64_t rank) const;
  Matrix second_factor(const std::string& name, std::int64_t rank, std::int64_t block) const;

  Weights& weights;
  const std::int64_t width;
  const std::string& at() const { return at_; }

 private:
  std::string at_;
};

class Model {
 public:
  virtual ~Model() = default;

  // `tokens` are those of all segments one after the other. Row i of `logits` [wanted.size(), vocab] is for
  // tokens[wanted[i]]; `wanted` rises. Tokens must be less than the vocabulary. Calls may overlap if states do not.
  void forward(
      std::span<const std::int32_t> tokens, std::span<const Segment> segments, std::span<const std::int32_t> wanted,
      float* logits, int threads) const;

  // Makes `state` [Sizes::state()] that before the first token.
  virtual void begin(float* state) const { std::fill_n(state, sizes.state(), 0.0f); }

  // Tensor name -> matrix, of those that adapters may change.
  const std::map<std::string, Matrix>& matrices() const { return matrices_; }

  const Sizes sizes;
  const Isa isa;
  // Columns of the second matrices of channel mixes that were read (and those that there are), over all calls.
  mutable std::atomic<std::int64_t> ffn_reads{0}, ffn_columns{0};
  mutable Times times;
  mutable LiteCounts lite_counts;

 protected:
  Model(const Sizes& given, Isa wanted) : sizes(given), isa(wanted) {}

  // Embedding, norms and head.
  void read_ends(Reader&);
  // Adds the channel mix of the reader's layer. Its mixes: of the key and, where there is a gate, of the receptance.
  void read_channel_mix(Reader&, std::int64_t layer, std::initializer_list<const char*> mixes, bool complement);
  // Makes the copies that the weights promised; the last step of reading.
  void finish(Weights& weights, int threads);

  virtual void run(const Call&, Workspace&) const = 0;

 private:
  void read_neurons(Reader&, std::int64_t layer, ChannelMix&);
  friend class Pass;

  Norm norm_in_, norm_out_;
  Matrix embedding_, head_;
  std::vector<ChannelMix> channel_mixes_;
  Clusters clusters_;
  std::shared_ptr<ModelFile> file_;  // null: mapped weights are used where they lie
  std::unique_ptr<EmbeddingCache> cache_;
  std::int64_t largest_rank_ = 0;  // of factored projections
  std::map<std::string, Matrix> matrices_;
  std::vector<std::shared_ptr<std::byte[]>> copies_;
  mutable Workspaces workspaces_;
};

}  // namespace rookery
