// The Python module rookery._native. Each part of the library binds its own functions in a file beside this one.
#include "bindings/module.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <span>
#include <string>
#include <vector>

#include "core/isa.hpp"
#include "core/threads.hpp"

namespace nb = nanobind;

NB_MODULE(_native, m) {
  m.doc() = "CPU kernels and runtime of rookery.";
  const auto names = [](std::span<const rookery::Isa> isas) {
    std::vector<std::string> all;
    for (const rookery::Isa isa : isas) all.emplace_back(rookery::name(isa));
    return all;
  };
  m.def("available_isas", [names] { return names(rookery::available_isas()); },
        "Instruction sets that this build has and this machine runs, the best one last.");
  m.def("imitated_isas", [names] { return names(rookery::imitated_isas()); },
        "Instruction sets that are only used where they are named: slow imitations of ones that the machine may lack.");
  m.def("isa_note", &rookery::isa_note, "Why an instruction set that the processor has is not used, or \"\".");
  m.def("available_cores", &rookery::available_cores, "Cores that this process may use.");
  rookery::bind_bi_wkv(m);
  rookery::bind_cross_entropy(m);
  rookery::bind_packing(m);
  rookery::bind_relu_squared(m);
  rookery::bind_runtime(m);
  rookery::bind_taylor_attention(m);
  rookery::bind_token_shift(m);
  rookery::bind_tokenizer(m);
  rookery::bind_wkv4(m);
  rookery::bind_wkv6(m);
  rookery::bind_wkv7(m);
  rookery::bind_wkv7_inputs(m);
  rookery::bind_wkv7_output(m);
}
