// y = x W^T + bias for a packed weight W.
#pragma once

#include <cstdint>

#include "cpu/weight.h"

namespace perp {

// What is multiplied: x [tokens, columns] and y [tokens, rows], both of the weight's dtype, with unit stride along their
// last dimension; bias [rows] of that dtype or float32, or null. `rows` rows of the weight from `first_row` on take part.
struct LinearCall {
  const void* x;
  std::int64_t x_stride;
  void* y;
  std::int64_t y_stride;
  std::int64_t tokens;
  const void* bias;
  bool bias_is_float;
  std::int64_t first_row;
  std::int64_t rows;
};

// Sums are formed in fp32 and rounded once. Results do not depend on the number of threads, nor on the other tokens or
// rows of the call's tile. dtype bf16, f16 or f32.
void sparse_linear(const Weight& weight, const LinearCall& call);

}  // namespace perp
