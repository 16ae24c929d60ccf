#include "runtime/weights.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <new>
#include <numeric>
#include <stdexcept>

#include "core/threads.hpp"
#include "kernels/elementwise.hpp"

namespace rookery {
namespace {

// Memory that starts at a cache line; in pages of 2 MB as far as it fills them, which are read up to a third faster.
std::shared_ptr<std::byte[]> aligned(std::size_t bytes) {
  constexpr std::size_t line = 64, page = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= page ? page : line;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= page) madvise(memory, bytes / page * page, MADV_HUGEPAGE);
#endif
  return {static_cast<std::byte*>(memory), std::free};
}

// out[j, i] = in[i, j], in squares that stay in the first-level cache.
template <class T>
void transpose(const T* in, std::int64_t rows, std::int64_t columns, T* out) {
  constexpr std::int64_t square = 32;
  for (std::int64_t i = 0; i < rows; i += square)
    for (std::int64_t j = 0; j < columns; j += square)
      for (std::int64_t n = j; n < std::min(columns, j + square); ++n)
        for (std::int64_t m = i; m < std::min(rows, i + square); ++m)
          std::memcpy(out + n * rows + m, in + m * columns + n, sizeof(T));
}

void copy_blocks(const Matrix& from, std::int64_t block, std::byte* to) {
  const auto size = static_cast<std::size_t>(block) * bytes_of(from.format);
  const auto* data = static_cast<const std::byte*>(from.data);
  for (std::int64_t o = 0; o < from.out; o += block)
    for (std::int64_t i = 0; i < from.in; ++i, to += size)
      std::memcpy(to, data + static_cast<std::size_t>(i * from.out + o) * bytes_of(from.format), size);
}

void check_floats(const Tensor& tensor, const std::string& name) {
  if (is_packed(tensor.format)) throw std::invalid_argument("tensor '" + name + "' is packed, and must be of floats");
}

}  // namespace

const Tensor& Weights::find(const std::string& name, std::int64_t count) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::invalid_argument("tensor '" + name + "' is missing");
  const auto& shape = found->second.shape;
  const auto size = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  if (size != count)
    throw std::invalid_argument(
        "tensor '" + name + "' has " + std::to_string(size) + " numbers, expected " + std::to_string(count));
  return found->second;
}

std::vector<float> Weights::vector(const std::string& name, std::int64_t count) const {
  const Tensor& tensor = find(name, count);
  check_floats(tensor, name);
  std::vector<float> values(static_cast<std::size_t>(count));
  elementwise_kernels(Isa::portable).widen[static_cast<int>(tensor.format)](tensor.data, values.data(), count);
  return values;
}

Matrix Weights::borrow(const std::string& name, Order order, std::int64_t out, std::int64_t in) {
  const Tensor& tensor = find(name, out * in);
  if (is_packed(tensor.format) && (tensor.order != order || tensor.shape != std::vector<std::int64_t>{out, in}))
    throw std::invalid_argument("tensor '" + name + "' is packed in another order or shape than this model needs");
  borrowed_.insert(name);
  return {tensor.data, tensor.format, order, out, in};
}

std::int64_t Weights::outputs(const std::string& name, std::int64_t in) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw std::invalid_argument("tensor '" + name + "' is missing");
  const auto& shape = found->second.shape;
  if (shape.size() != 2 || shape[1] != in)
    throw std::invalid_argument("tensor '" + name + "' is no matrix of " + std::to_string(in) + " inputs");
  return shape[0];
}

Matrix Weights::neurons(const std::string& name, std::int64_t hidden, std::int64_t width) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end() || !is_packed(found->second.format)) return borrow(name, Order::rows, hidden, 2 * width);
  if (found->second.format != Format::int8) throw std::invalid_argument("tensor '" + name + "' is not packed as int8");
  const std::int64_t line = Packing::line, unit = (width + line - 1) / line * line;
  return borrow(name, Order::columns, unit + width, hidden);
}

Matrix Weights::turned(const std::string& name, Order stored, std::int64_t out, std::int64_t in) {
  const Tensor& tensor = find(name, out * in);
  const Order wanted = stored == Order::rows ? Order::columns : Order::rows;
  if (is_packed(tensor.format)) return borrow(name, wanted, out, in);
  const Matrix from{tensor.data, tensor.format, stored, out, in};
  copies_.push_back(aligned(from.bytes()));
  pending_.push_back({from, copies_.back().get(), 0});
  return {copies_.back().get(), tensor.format, wanted, out, in};
}

Matrix Weights::in_blocks(const std::string& name, std::int64_t out, std::int64_t in, std::int64_t block) {
  const Tensor& tensor = find(name, out * in);
  check_floats(tensor, name);
  const Matrix from{tensor.data, tensor.format, Order::columns, out, in};
  copies_.push_back(aligned(from.bytes()));
  pending_.push_back({from, copies_.back().get(), block});
  return {copies_.back().get(), tensor.format, Order::columns, block, in};
}

void Weights::fill(int threads) {
  parallel_for(static_cast<int>(pending_.size()), threads, [&](int i) {
    const auto& [from, to, block] = pending_[static_cast<std::size_t>(i)];
    const auto rows = from.order == Order::rows ? from.out : from.in;
    const auto columns = from.order == Order::rows ? from.in : from.out;
    if (block)
      copy_blocks(from, block, to);
    else if (bytes_of(from.format) == 4)
      transpose(static_cast<const std::uint32_t*>(from.data), rows, columns, reinterpret_cast<std::uint32_t*>(to));
    else
      transpose(static_cast<const std::uint16_t*>(from.data), rows, columns, reinterpret_cast<std::uint16_t*>(to));
  });
  pending_.clear();
}

}  // namespace rookery
