// What each binding file adds to the module.
#pragma once

#include <nanobind/nanobind.h>

namespace rookery {

void bind_wkv7(nanobind::module_& m);

}  // namespace rookery
