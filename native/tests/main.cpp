// Kernels, runtimes and readers without Python, for sanitizers and for other processors: make sanitize, make test-arm.
#include <exception>

#include "tests/check.hpp"

int main(int count, char** words) {
  using namespace rookery::tests;
  std::cout << "instruction sets:";
  for (const rookery::Isa isa : rookery::available_isas()) std::cout << ' ' << name(isa);
  std::cout << '\n';
  int wrong = 0;
  for (const Test& test : tests()) {
    if (count > 1 && std::string(test.name).find(words[1]) == std::string::npos) continue;
    failures = 0;
    try {
      test.run();
    } catch (const std::exception& error) {
      expect(false, error.what());
    }
    std::cout << (failures ? "FAILED  " : "ok      ") << test.name << std::endl;
    wrong += failures != 0;
  }
  std::cout << tests().size() << " tests, " << wrong << " failed\n";
  return wrong != 0;
}
