#include "kernels/wkv7.hpp"

#include "bindings/module.hpp"

namespace rookery {

void bind_wkv7(nanobind::module_&) {}

}  // namespace rookery
