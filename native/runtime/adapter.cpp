#include "runtime/adapter.hpp"

#include <algorithm>
#include <stdexcept>

#include "runtime/model.hpp"

namespace rookery {

using std::int64_t;

Adapter::Adapter(const Model& model, const std::map<std::string, Factors>& factors)
    : model_(&model) {
  const auto copied = [&](const float* from, int64_t count) {
    return numbers_.emplace_back(from, from + count).data();
  };
  for (const auto& [name, of] : factors) {
    const auto found = model.matrices().find(name);
    if (found == model.matrices().end() || found->second.out != of.out || found->second.in != of.in || of.rank < 1)
      throw std::invalid_argument("the model has no matrix '" + name + "' that these factors fit");
    changes_[found->second.data] = {
        {copied(of.a, of.rank * of.in), Format::float32, Order::rows, of.rank, of.in},
        {copied(of.b, of.rank * of.out), Format::float32, Order::columns, of.out, of.rank}};
    largest_rank_ = std::max(largest_rank_, of.rank);
  }
}

}  // namespace rookery
