// A model's tensors on their way into a runtime: used where they lie as far as their layout allows, else copied.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/matrix.hpp"
#include "runtime/lite.hpp"

namespace rookery {

// Memory of the caller.
struct Tensor {
  const void* data;
  Format format;
  std::vector<std::int64_t> shape;
  Order order = Order::rows;  // of a packed matrix
};

// A matrix, or two factors of one: `first` is applied before it.
struct Projection : Matrix {
  Matrix first;
};

class Weights {
 public:
  // How the model was compressed, if it was.
  Lite lite;
  // The largest rank of a factored projection.
  std::int64_t largest_rank = 0;

  explicit Weights(std::map<std::string, Tensor> tensors) : tensors_(std::move(tensors)) {}

  // All throw std::invalid_argument where the tensor is missing or has another size.
  // float32 copy of `count` numbers.
  std::vector<float> vector(const std::string& name, std::int64_t count) const;
  // The tensor itself: the caller's memory must outlive the matrix.
  Matrix borrow(const std::string& name, Order order, std::int64_t out, std::int64_t in);
  bool has(const std::string& name) const { return tensors_.contains(name); }
  // Outputs of the tensor as a matrix of `in` inputs.
  std::int64_t outputs(const std::string& name, std::int64_t in) const;
  // Key rows and value columns of hidden units side by side: [hidden, 2 width], or packed by columns, [unit + width,
  // hidden], `unit` being the width filled up to whole lines.
  Matrix neurons(const std::string& name, std::int64_t hidden, std::int64_t width);
  // A copy in the other order than `stored`, which is that of the tensor. Call `fill` before use. Packed matrices are
  // borrowed: they lie in the order that is needed already.
  Matrix turned(const std::string& name, Order stored, std::int64_t out, std::int64_t in);

  // A copy of a tensor [in, out] in blocks of `block` outputs, each stored by columns; the matrix is the first of them.
  Matrix in_blocks(const std::string& name, std::int64_t out, std::int64_t in, std::int64_t block);

  // `matrix`, which adapters that name it may change.
  Matrix changeable(const std::string& name, Matrix matrix) { return changeable_[name] = matrix; }
  const std::map<std::string, Matrix>& changeable() const { return changeable_; }

  // Makes the copies that `turned` and `in_blocks` promised, on `threads` threads.
  void fill(int threads);
  const std::set<std::string>& borrowed() const { return borrowed_; }
  // The memory of the copies; whoever uses the matrices keeps it.
  std::vector<std::shared_ptr<std::byte[]>> copies() const { return copies_; }

 private:
  struct Copy {
    Matrix from;
    std::byte* to;
    std::int64_t block;  // 0: turned
  };
  const Tensor& find(const std::string& name, std::int64_t count) const;

  std::map<std::string, Tensor> tensors_;
  std::set<std::string> borrowed_;
  std::vector<std::shared_ptr<std::byte[]>> copies_;
  std::vector<Copy> pending_;
  std::map<std::string, Matrix> changeable_;
};

}  // namespace rookery
