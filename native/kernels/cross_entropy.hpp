// Softmax cross-entropy of rows of logits on the CPU.
#pragma once

#include <cstdint>

#include "core/isa.hpp"

namespace rookery {

struct CrossEntropy {
  std::int64_t vocabulary, ignored;  // a target that counts for nothing
  void* logits;                      // float32 or bfloat16 [rows, vocabulary]
  const std::int64_t* targets;       // [rows]
  float* losses;                     // [rows], in nats
  float scale, pull;                 // of the gradient; see below
};

// Index of the kernels: 0 float32, 1 bfloat16. Rows begin … end − 1.
struct CrossEntropyKernels {
  // Writes the losses; 0 where the target is ignored.
  void (*losses[2])(const CrossEntropy&, std::int64_t begin, std::int64_t end);
  // Also replaces the logits by scale · (softmax − one-hot target), without this term where the target is ignored, plus
  // pull · largest at the largest logit, shared equally among equal ones.
  void (*gradient[2])(const CrossEntropy&, std::int64_t begin, std::int64_t end);
};

ROOKERY_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy)

}  // namespace rookery
